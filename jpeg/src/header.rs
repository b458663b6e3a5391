//! The segments of a JPEG file: the frame, its tables, and the markers that define the color encoding.
//!
//! Source: ITU T.81, annex B; JFIF 1.02; Adobe technical note 5116 for the marker APP14.

use std::sync::LazyLock;

use super::damage::Damage;
use super::huffman::HuffmanTable;

/// First and last marker of baseline, extended sequential and progressive frames with Huffman codes.
const SOF0: u8 = 0xc0;
const SOF2: u8 = 0xc2;
/// First and last marker of other frames. [`DHT`], [`JPG`] and [`DAC`] lie in this range too.
const SOF3: u8 = 0xc3;
const SOF15: u8 = 0xcf;
const DHT: u8 = 0xc4;
const JPG: u8 = 0xc8;
const DAC: u8 = 0xcc;
const SOI: u8 = 0xd8;
const EOI: u8 = 0xd9;
const SOS: u8 = 0xda;
const DQT: u8 = 0xdb;
const DRI: u8 = 0xdd;
const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const APP14: u8 = 0xee;

/// The position of coefficient `k` of a scan in a block, line by line: T.81, figure 5.
pub(super) static NATURAL: [u8; 64] = {
    let (mut order, mut k) = ([0; 64], 0);
    let mut diagonal = 0;
    while diagonal < 15 {
        let mut step = 0;
        while step <= diagonal {
            // Odd diagonals lead down, even ones up.
            let (line, column) = if diagonal % 2 == 1 {
                (step, diagonal - step)
            } else {
                (diagonal - step, step)
            };
            if line < 8 && column < 8 {
                order[k] = line * 8 + column;
                k += 1;
            }
            step += 1;
        }
        diagonal += 1;
    }
    order
};

/// The frame header of a file.
#[derive(Debug)]
pub(super) struct Frame {
    pub width: usize,
    pub height: usize,
    pub progressive: bool,
    pub components: Vec<Component>,
}

impl Frame {
    /// Returns the greatest sampling factors of its components, across and down.
    pub(super) fn most(&self) -> (usize, usize) {
        let greatest = |factor: fn(&Component) -> usize| {
            let factors = self.components.iter().map(factor);
            factors.max().unwrap_or(1)
        };
        (
            greatest(|component| component.across),
            greatest(|component| component.down),
        )
    }

    /// Returns whether component ids are unique and all samples lie on a common grid.
    pub(super) fn is_regular(&self) -> bool {
        let (across, down) = self.most();
        self.components
            .iter()
            .enumerate()
            .all(|(place, component)| {
                let mut others = self.components[..place].iter();
                others.all(|other| other.id != component.id)
                    && across.is_multiple_of(component.across)
                    && down.is_multiple_of(component.down)
            })
    }
}

/// One component of a frame.
#[derive(Debug)]
pub(super) struct Component {
    /// Its id in scans.
    pub id: u8,
    /// Sampling factors across and down, relative to the component with the most samples.
    pub across: usize,
    pub down: usize,
    /// Index of its quantization table.
    pub table: usize,
}

/// The tables at a point in the file; later segments replace them.
#[derive(Default)]
pub(super) struct Tables {
    /// Quantization steps, line by line.
    pub steps: [Option<[u16; 64]>; 4],
    pub dc: [Option<Box<HuffmanTable>>; 4],
    pub ac: [Option<Box<HuffmanTable>>; 4],
    /// MCUs between two restart markers, or 0 if there are none.
    pub restart: usize,
}

impl Tables {
    /// Returns the codes for a sequential file without its own tables, such as a Motion JPEG frame. libjpeg has them
    /// too.
    pub(super) fn usual() -> &'static Self {
        static USUAL: LazyLock<Tables> = LazyLock::new(|| {
            let mut tables = Tables::default();
            read_codes(&USUAL_CODES, &mut tables).expect("the standard's own tables");
            tables
        });
        &USUAL
    }
}

/// The tables of T.81, K.3, in the format of a segment.
#[rustfmt::skip]
static USUAL_CODES: [u8; 416] = [
    0, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2,
    3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 0, 2, 1, 3, 3, 2, 4, 3, 5, 5,
    4, 4, 0, 0, 1, 125, 1, 2, 3, 0, 4, 17, 5, 18, 33, 49, 65, 6, 19, 81,
    97, 7, 34, 113, 20, 50, 129, 145, 161, 8, 35, 66, 177, 193, 21, 82, 209, 240, 36, 51,
    98, 114, 130, 9, 10, 22, 23, 24, 25, 26, 37, 38, 39, 40, 41, 42, 52, 53, 54, 55,
    56, 57, 58, 67, 68, 69, 70, 71, 72, 73, 74, 83, 84, 85, 86, 87, 88, 89, 90, 99,
    100, 101, 102, 103, 104, 105, 106, 115, 116, 117, 118, 119, 120, 121, 122, 131, 132, 133, 134, 135,
    136, 137, 138, 146, 147, 148, 149, 150, 151, 152, 153, 154, 162, 163, 164, 165, 166, 167, 168, 169,
    170, 178, 179, 180, 181, 182, 183, 184, 185, 186, 194, 195, 196, 197, 198, 199, 200, 201, 202, 210,
    211, 212, 213, 214, 215, 216, 217, 218, 225, 226, 227, 228, 229, 230, 231, 232, 233, 234, 241, 242,
    243, 244, 245, 246, 247, 248, 249, 250, 1, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 17, 0, 2,
    1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119, 0, 1, 2, 3, 17, 4,
    5, 33, 49, 6, 18, 65, 81, 7, 97, 113, 19, 34, 50, 129, 8, 20, 66, 145, 161, 177,
    193, 9, 35, 51, 82, 240, 21, 98, 114, 209, 10, 22, 36, 52, 225, 37, 241, 23, 24, 25,
    26, 38, 39, 40, 41, 42, 53, 54, 55, 56, 57, 58, 67, 68, 69, 70, 71, 72, 73, 74,
    83, 84, 85, 86, 87, 88, 89, 90, 99, 100, 101, 102, 103, 104, 105, 106, 115, 116, 117, 118,
    119, 120, 121, 122, 130, 131, 132, 133, 134, 135, 136, 137, 138, 146, 147, 148, 149, 150, 151, 152,
    153, 154, 162, 163, 164, 165, 166, 167, 168, 169, 170, 178, 179, 180, 181, 182, 183, 184, 185, 186,
    194, 195, 196, 197, 198, 199, 200, 201, 202, 210, 211, 212, 213, 214, 215, 216, 217, 218, 226, 227,
    228, 229, 230, 231, 232, 233, 234, 242, 243, 244, 245, 246, 247, 248, 249, 250,
];

/// One component of a scan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Its index in the frame.
    pub component: usize,
    /// Its Huffman tables.
    pub dc: usize,
    pub ac: usize,
}

/// The header of a scan: T.81, B.2.3.
#[derive(Clone, Debug)]
pub(super) struct Scan {
    pub parts: Vec<Part>,
    /// First and last coefficient.
    pub first: usize,
    pub last: usize,
    /// The lowest bit of coefficients known before the scan (0: none), and after it.
    pub high: u8,
    pub low: u8,
}

/// The next part of a file that the caller handles.
pub(super) enum Event {
    /// The frame, or `None` if this decoder does not support its kind.
    Frame(Option<Frame>),
    /// A scan; its data follows.
    Scan(Scan),
    End,
}

/// Reads the segments of a file in order.
pub(super) struct Segments<'a> {
    bytes: &'a [u8],
    /// Offset of the next byte.
    pub at: usize,
    pub tables: Tables,
    pub exif: Option<&'a [u8]>,
    pub jfif: bool,
    /// The color transform in Adobe's marker.
    pub adobe: Option<u8>,
    /// Whether there were stray bytes between two segments.
    pub stray: bool,
}

impl<'a> Segments<'a> {
    /// Starts at the first segment of a file that begins like a JPEG.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 2,
            tables: Tables::default(),
            exif: None,
            jfif: false,
            adobe: None,
            stray: false,
        }
    }

    fn byte(&mut self) -> Result<u8, Damage> {
        let byte = self.bytes.get(self.at).ok_or(Damage::Truncated)?;
        self.at += 1;
        Ok(*byte)
    }

    /// Reads the content of a segment, after its marker.
    fn content(&mut self) -> Result<&'a [u8], Damage> {
        let length = usize::from(self.byte()?) << 8 | usize::from(self.byte()?);
        let length = length
            .checked_sub(2)
            .ok_or(Damage::Damaged("a segment has an invalid length"))?;
        let content = self.bytes.get(self.at..self.at + length);
        self.at += length;
        content.ok_or(Damage::Truncated)
    }

    /// Reads the next marker. Bytes before it are skipped, as in libjpeg.
    fn marker(&mut self) -> Result<u8, Damage> {
        loop {
            let before = self.at;
            while self.byte()? != 0xff {}
            self.stray |= self.at > before + 1;
            let mut marker = self.byte()?;
            while marker == 0xff {
                marker = self.byte()?;
            }
            match marker {
                // A stuffed byte of compressed data.
                0x00 => self.stray = true,
                marker => return Ok(marker),
            }
        }
    }

    /// Reads segments up to the next frame, scan or end.
    ///
    /// Pass the frame as soon as it is known, since scans refer to its components.
    pub(super) fn next(&mut self, frame: Option<&Frame>) -> Result<Event, Damage> {
        loop {
            let marker = self.marker()?;
            match marker {
                EOI => return Ok(Event::End),
                // A restart marker outside a scan is harmless.
                0x01 | 0xd0..=0xd7 => continue,
                SOI => return Err(Damage::Damaged("unexpected start-of-image marker")),
                _ => {}
            }
            let content = self.content()?;
            match marker {
                SOS => return scan(content, frame).map(Event::Scan),
                DQT => read_steps(content, &mut self.tables)?,
                DHT => read_codes(content, &mut self.tables)?,
                DRI => match content {
                    [high, low] => {
                        self.tables.restart = usize::from(*high) << 8 | usize::from(*low)
                    }
                    _ => return Err(Damage::Damaged("invalid restart interval")),
                },
                APP0 if content.starts_with(b"JFIF\0") => self.jfif = true,
                APP1 if content.starts_with(b"Exif\0\0") && self.exif.is_none() => {
                    self.exif = Some(content);
                }
                APP14 if content.starts_with(b"Adobe") => {
                    self.adobe = self.adobe.or(content.get(11).copied());
                }
                JPG | DAC => return Ok(Event::Frame(None)),
                SOF0..=SOF15 if frame.is_some() => {
                    return Err(Damage::Damaged("more than one frame"));
                }
                SOF0..=SOF2 => return read_frame(content, marker).map(Event::Frame),
                SOF3..=SOF15 => return Ok(Event::Frame(None)),
                _ => {}
            }
        }
    }
}

/// Reads a frame header. Returns `None` if its precision or number of components is not supported.
fn read_frame(content: &[u8], marker: u8) -> Result<Option<Frame>, Damage> {
    let [bits, h1, h0, w1, w0, count, components @ ..] = content else {
        return Err(Damage::Damaged("the frame header is too short"));
    };
    if components.len() != 3 * usize::from(*count) {
        return Err(Damage::Damaged("the frame header has the wrong length"));
    }
    if *bits != 8 || !matches!(count, 1 | 3) {
        return Ok(None);
    }
    let components: Vec<Component> = components
        .chunks_exact(3)
        .map(|values| Component {
            id: values[0],
            across: usize::from(values[1] >> 4),
            down: usize::from(values[1] & 15),
            table: usize::from(values[2]),
        })
        .collect();
    let wrong = |component: &Component| {
        let factors = 1..=4;
        let right = factors.contains(&component.across) && factors.contains(&component.down);
        !right || component.table > 3
    };
    if components.iter().any(wrong) {
        return Err(Damage::Damaged("invalid component in the frame header"));
    }
    Ok(Some(Frame {
        width: usize::from(*w1) << 8 | usize::from(*w0),
        height: usize::from(*h1) << 8 | usize::from(*h0),
        progressive: marker == SOF2,
        components,
    }))
}

/// Reads a scan header.
fn scan(content: &[u8], frame: Option<&Frame>) -> Result<Scan, Damage> {
    let wrong = Damage::Damaged("invalid scan header");
    let frame = frame.ok_or(Damage::Damaged("a scan precedes the frame"))?;
    let (count, rest) = content.split_first().ok_or(wrong)?;
    let (parts, last) = rest
        .split_at_checked(2 * usize::from(*count))
        .ok_or(wrong)?;
    let [first, last, bits] = last else {
        return Err(wrong);
    };
    let mut found: Vec<Part> = Vec::new();
    for values in parts.chunks_exact(2) {
        let mut components = frame.components.iter();
        let component = components
            .position(|component| component.id == values[0])
            .filter(|place| found.iter().all(|part| part.component != *place))
            .ok_or(Damage::Damaged(
                "a scan has a component that is not in the frame",
            ))?;
        let (dc, ac) = (usize::from(values[1] >> 4), usize::from(values[1] & 15));
        if dc > 3 || ac > 3 {
            return Err(wrong);
        }
        found.push(Part { component, dc, ac });
    }
    let blocks = found.iter().map(|part| &frame.components[part.component]);
    let blocks: usize = blocks
        .map(|component| component.across * component.down)
        .sum();
    if found.is_empty() || (found.len() > 1 && blocks > 10) {
        return Err(wrong);
    }
    let scan = Scan {
        parts: found,
        first: usize::from(*first),
        last: usize::from(*last),
        high: bits >> 4,
        low: bits & 15,
    };
    let means = scan.first == 0 && scan.last == 0;
    let others =
        scan.first > 0 && scan.first <= scan.last && scan.last < 64 && scan.parts.len() == 1;
    let refined = scan.low <= 13 && (scan.high == 0 || scan.high == scan.low + 1);
    if frame.progressive && !((means || others) && refined) {
        return Err(wrong);
    }
    Ok(scan)
}

/// Reads quantization tables, which are in zigzag order in the file.
fn read_steps(mut content: &[u8], tables: &mut Tables) -> Result<(), Damage> {
    let wrong = Damage::Damaged("invalid quantization table");
    while let Some((kind, rest)) = content.split_first() {
        let wide = match kind >> 4 {
            0 => 1,
            1 => 2,
            _ => return Err(wrong),
        };
        let (values, rest) = rest.split_at_checked(64 * wide).ok_or(wrong)?;
        let mut steps = [0; 64];
        for (value, place) in values.chunks_exact(wide).zip(&NATURAL) {
            steps[usize::from(*place)] = value
                .iter()
                .fold(0, |sum, byte| sum << 8 | u16::from(*byte));
        }
        *tables.steps.get_mut(usize::from(kind & 15)).ok_or(wrong)? = Some(steps);
        content = rest;
    }
    Ok(())
}

/// Reads Huffman tables: the number of codes of each length, then their symbols.
fn read_codes(mut content: &[u8], tables: &mut Tables) -> Result<(), Damage> {
    let wrong = Damage::Damaged("invalid Huffman table");
    while let Some((kind, rest)) = content.split_first() {
        let (counts, rest) = rest.split_first_chunk::<16>().ok_or(wrong)?;
        let count = counts.iter().map(|count| usize::from(*count)).sum();
        let (symbols, rest) = rest.split_at_checked(count).ok_or(wrong)?;
        let table = HuffmanTable::new(counts, symbols).ok_or(wrong)?;
        let class = match kind >> 4 {
            0 => &mut tables.dc,
            1 => &mut tables.ac,
            _ => return Err(wrong),
        };
        *class.get_mut(usize::from(kind & 15)).ok_or(wrong)? = Some(Box::new(table));
        content = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_natural_order_is_the_zigzag_of_the_standard() {
        assert_eq!(NATURAL[..10], [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]);
        assert_eq!(NATURAL[58..], [61, 54, 47, 55, 62, 63]);
        let mut sorted = NATURAL.to_vec();
        sorted.sort_unstable();
        assert!(
            sorted
                .iter()
                .enumerate()
                .all(|(place, value)| place == usize::from(*value))
        );
    }
}
