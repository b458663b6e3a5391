//! JPEG files to pixels: to libjpeg-turbo's bits, strictly, and only where pixels are needed.
//!
//! The common files: 8 bits, Huffman codes, baseline, extended sequential and progressive; grey, or three components
//! that are YCbCr or RGB; any whole sampling factors, restart intervals, components in one scan or several.
//! [`Jpeg::open`] gives none for others (CMYK, arithmetic codes, 12 bits), which [`super::decode`] has another
//! decoder for.
//!
//! All of a file's bits are read whatever region is asked for, so that its damage is found for every crop alike.
//! What no crop needs is the arithmetic after that: coefficients outside the region are neither kept nor transformed.
//!
//! | file | what |
//! |------|------|
//! | [`header`] | segments, tables, what a scan brings |
//! | [`entropy`] | restart intervals, the order of blocks |
//! | [`huffman`] | bits and codes |
//! | [`sequential`] [`progressive`] | a block's coefficients |
//! | [`channel`] | samples of a component, upsampled |
//!
//! Source: ITU T.81; the arithmetic is in `advxl_kernels::jpeg`.
//! Held to Pillow's bytes by the files of `tests/golden/make_pictures.py`.

mod channel;
mod entropy;
mod header;
mod huffman;
mod progressive;
mod sequential;

use advxl_kernels::jpeg::ycc_to_rgb;

use super::picture::Region;
use channel::{Channel, Work};
pub(super) use entropy::find_ff;
use entropy::Grid;
use header::{Event, Frame, Part, Scan, Segments};
use huffman::HuffmanTable;
use progressive::{Means, Others};
use sequential::{Sequential, Stream};

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It ends too early.
    Truncated,
    /// Something in it cannot be right.
    Damaged(&'static str),
}

/// A file whose header is read.
pub struct Jpeg<'a> {
    bytes: &'a [u8],
    segments: Segments<'a>,
    frame: Frame,
    /// The first.
    scan: Scan,
}

impl<'a> Jpeg<'a> {
    /// Reads the header of a file that begins as a JPEG does; none if it is of a rare kind.
    ///
    /// Errors: a header that is damaged or cut short.
    pub fn open(bytes: &'a [u8]) -> Result<Option<Self>, Damage> {
        let mut segments = Segments::new(bytes);
        let frame = match segments.next(None)? {
            Event::Frame(frame) => frame.filter(Frame::is_regular),
            _ => return Err(Damage::Damaged("there is no frame")),
        };
        let Some(frame) = frame else { return Ok(None) };
        let Event::Scan(scan) = segments.next(Some(&frame))? else {
            return Err(Damage::Damaged("there are no scans"));
        };
        Ok(Some(Self {
            bytes,
            segments,
            frame,
            scan,
        }))
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.frame.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.frame.height
    }

    /// Whether there are no colours.
    pub fn is_grey(&self) -> bool {
        self.frame.components.len() == 1
    }

    /// The EXIF data, if there are any.
    pub fn exif(&self) -> Option<&'a [u8]> {
        self.segments.exif
    }

    /// Decodes the pixels of a region, which lies within the picture and is not empty.
    ///
    /// Shapes: the result is `[height, width, 3]` of the region.
    /// Errors: damage anywhere in the file, within the region or not.
    pub fn decode(mut self, region: &Region) -> Result<Vec<u8>, Damage> {
        let components = self.frame.components.iter();
        let channels = components.map(|component| Channel::new(&self.frame, component, region));
        let mut channels: Vec<Channel> = channels.collect();
        let mut scan = self.scan.clone();
        loop {
            self.read_scan(&scan, &mut channels)?;
            scan = match self.segments.next(Some(&self.frame))? {
                Event::Scan(scan) => scan,
                Event::End => break,
                Event::Frame(_) => return Err(Damage::Damaged("there are two frames")),
            };
        }
        let complete = |channel: &Channel| channel.known.iter().all(|known| *known == Some(0));
        if !channels.iter().all(complete) {
            return Err(Damage::Damaged("scans are missing"));
        }
        if self.frame.progressive {
            channels.iter_mut().for_each(Channel::fill_from_coefficients);
        }
        Ok(self.colours(&channels, region))
    }

    /// Reads the data of a scan.
    fn read_scan(&mut self, scan: &Scan, channels: &mut [Channel]) -> Result<(), Damage> {
        for part in &scan.parts {
            let steps = self.frame.components[part.component].table;
            let channel = &mut channels[part.component];
            channel.steps = channel.steps.or(self.segments.tables.steps[steps]);
            if channel.steps.is_none() {
                return Err(Damage::Damaged("a quantisation table is missing"));
            }
            follow(channel, scan, self.frame.progressive)?;
        }
        let tables = &self.segments.tables;
        let grid = grid(&self.frame, scan, channels, tables.restart);
        let (bytes, at) = (self.bytes, self.segments.at);
        self.segments.at = if !self.frame.progressive {
            let parts = with_channels(&scan.parts, channels);
            let streams = parts.zip(&grid.blocks).map(|((part, channel), (_, down))| {
                let (dc, ac) = (code(&tables.dc, part.dc)?, code(&tables.ac, part.ac)?);
                Ok(Stream::new(dc, ac, channel, *down))
            });
            let streams = streams.collect::<Result<_, _>>()?;
            entropy::read(bytes, at, &grid, &mut Sequential { streams })
        } else if scan.first == 0 {
            let parts = with_channels(&scan.parts, channels).map(|(part, channel)| {
                let first = scan.high == 0;
                let table = first.then(|| code(&tables.dc, part.dc)).transpose()?;
                Ok((table, channel, 0))
            });
            let parts = parts.collect::<Result<_, _>>()?;
            let low = scan.low;
            entropy::read(bytes, at, &grid, &mut Means { parts, low })
        } else {
            let (part, table) = (scan.parts[0], code(&tables.ac, scan.parts[0].ac)?);
            let mut others = Others::new(table, &mut channels[part.component], scan);
            entropy::read(bytes, at, &grid, &mut others)
        }?;
        Ok(())
    }

    /// Upsamples the components and converts them to red, green and blue.
    fn colours(&self, channels: &[Channel], region: &Region) -> Vec<u8> {
        let mut pixels = vec![0; 3 * region.width * region.height];
        let is_rgb = self.is_rgb();
        let mut works = [Work::default(), Work::default(), Work::default()];
        let lines = pixels.chunks_exact_mut(3 * region.width);
        for (y, line) in (region.top..).zip(lines) {
            let mut lines = channels.iter().zip(&mut works);
            let mut next = || lines.next().map(|(channel, work)| channel.pixels(y, region, work));
            match (next(), next(), next()) {
                (Some(luma), Some(blue), Some(red)) if !is_rgb => {
                    ycc_to_rgb(luma, blue, red, line);
                }
                (Some(red), green, blue) => {
                    let (green, blue) = (green.unwrap_or(red), blue.unwrap_or(red));
                    let values = red.iter().zip(green).zip(blue);
                    for (pixel, ((red, green), blue)) in line.chunks_exact_mut(3).zip(values) {
                        pixel.copy_from_slice(&[*red, *green, *blue]);
                    }
                }
                _ => {}
            }
        }
        pixels
    }

    /// Whether three components are red, green and blue. Source: libjpeg-turbo's `jdapimin.c`.
    fn is_rgb(&self) -> bool {
        let ids = self.frame.components.iter().map(|component| component.id);
        match self.segments.adobe {
            _ if self.segments.jfif => false,
            Some(transform) => transform == 0,
            None => ids.eq(*b"RGB"),
        }
    }
}

/// Notes what a scan brings of a component.
///
/// Errors: it brings what is there already, or a bit whose predecessor is missing.
fn follow(channel: &mut Channel, scan: &Scan, progressive: bool) -> Result<(), Damage> {
    // A sequential scan brings all of a component, whatever its header says.
    let (range, before, low) = match progressive {
        true => (scan.first..=scan.last, (scan.high > 0).then_some(scan.high), scan.low),
        false => (0..=63, None, 0),
    };
    let known = &mut channel.known[range];
    if known.iter().any(|known| *known != before) {
        return Err(Damage::Damaged("scans are missing or come twice"));
    }
    known.fill(Some(low));
    Ok(())
}

/// How the blocks of a scan follow each other. Source: T.81, A.2.
fn grid(frame: &Frame, scan: &Scan, channels: &[Channel], restart: usize) -> Grid {
    if let [part] = scan.parts[..] {
        let all = &channels[part.component].all;
        let (columns, rows) = (all.columns.len(), all.rows.len());
        let blocks = vec![(1, 1)];
        return Grid { columns, rows, blocks, restart };
    }
    let (across, down) = frame.most();
    let of = |part: &Part| {
        let component = &frame.components[part.component];
        (component.across, component.down)
    };
    Grid {
        columns: frame.width.div_ceil(8 * across),
        rows: frame.height.div_ceil(8 * down),
        blocks: scan.parts.iter().map(of).collect(),
        restart,
    }
}

/// The channels of a scan's parts, in their order.
fn with_channels<'a>(
    parts: &'a [Part],
    channels: &'a mut [Channel],
) -> impl Iterator<Item = (&'a Part, &'a mut Channel)> {
    let mut channels: Vec<Option<&mut Channel>> = channels.iter_mut().map(Some).collect();
    let channel = move |part: &'a Part| Some((part, channels[part.component].take()?));
    parts.iter().filter_map(channel)
}

fn code(tables: &[Option<Box<HuffmanTable>>; 4], number: usize) -> Result<&HuffmanTable, Damage> {
    let table = tables[number].as_deref();
    table.ok_or(Damage::Damaged("a Huffman table is missing"))
}
