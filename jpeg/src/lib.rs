//! A strict JPEG decoder, bit-exact with libjpeg-turbo, that computes only the pixels that are needed.
//!
//! Supports common files: 8 bits, Huffman codes, baseline, extended sequential and progressive; grayscale, or three
//! components of YCbCr or RGB; any integer sampling factors, restart intervals, components in one scan or several.
//! [`Jpeg::open`] returns `None` for others (CMYK, arithmetic codes, 12 bits): use another decoder for them.
//!
//! All bits of a file are read for any region, so that damage is detected regardless of the crop. Only the arithmetic
//! after that is skipped: in sequential files, coefficients outside the region are neither kept nor transformed.
//!
//! | file | what |
//! |------|------|
//! | `header` | segments, tables, scan headers |
//! | `entropy` | restart intervals, the order of blocks |
//! | `huffman` | bit reader, Huffman codes |
//! | `sequential` `progressive` | the coefficients of a block |
//! | `channel` | the samples of a component, and upsampling |
//! | `region` | rectangles of pixels |
//!
//! Source: ITU T.81; the arithmetic is in `advxl_kernels::jpeg`.
//! Tested against Pillow's bytes with the files made by `tests/golden/make_pictures.py`.

mod channel;
mod damage;
mod entropy;
mod header;
mod huffman;
mod progressive;
mod region;
mod sequential;

use std::ops::Range;

use advxl_kernels::jpeg::ycc_to_rgb;

use channel::{Channel, Work};
pub use damage::Damage;
use entropy::Grid;
pub use entropy::find_ff;
use header::{Event, Frame, Part, Scan, Segments, Tables};
use huffman::HuffmanTable;
use progressive::{Means, Others};
pub use region::Region;
use sequential::{Sequential, Stream};

/// A JPEG file with its header read.
pub struct Jpeg<'a> {
    bytes: &'a [u8],
    segments: Segments<'a>,
    frame: Frame,
    /// The first scan.
    scan: Scan,
    irregular: bool,
}

impl<'a> Jpeg<'a> {
    /// Reads the header of a file that begins like a JPEG. Returns `None` if it is of a rare, unsupported kind.
    ///
    /// Errors: a damaged or truncated header.
    pub fn open(bytes: &'a [u8]) -> Result<Option<Self>, Damage> {
        let mut segments = Segments::new(bytes);
        let frame = match segments.next(None)? {
            Event::Frame(frame) => frame.filter(Frame::is_regular),
            _ => return Err(Damage::Damaged("missing frame")),
        };
        let Some(frame) = frame else { return Ok(None) };
        let Event::Scan(scan) = segments.next(Some(&frame))? else {
            return Err(Damage::Damaged("missing scan"));
        };
        Ok(Some(Self {
            bytes,
            segments,
            frame,
            scan,
            irregular: false,
        }))
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> usize {
        self.frame.width
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> usize {
        self.frame.height
    }

    /// Returns whether the image is grayscale.
    pub fn is_grey(&self) -> bool {
        self.frame.components.len() == 1
    }

    /// Returns the EXIF data, if any.
    pub fn exif(&self) -> Option<&'a [u8]> {
        self.segments.exif
    }

    /// Returns whether the decoded file violates the format without loss of pixels: bytes between segments, missing
    /// Huffman tables, scans that omit coefficients.
    pub fn is_irregular(&self) -> bool {
        self.irregular || self.segments.stray
    }

    /// Decodes the pixels of a region, which must lie within the image and must not be empty.
    ///
    /// Shapes: the result is `[height, width, 3]` of the region.
    /// Errors: damage anywhere in the file, inside or outside the region.
    pub fn decode(&mut self, region: &Region) -> Result<Vec<u8>, Damage> {
        self.decode_reduced(region, 1)
    }

    /// Decodes a region at 1 / `reduction` of the scale, for a reduction of 1, 2, 4 or 8. Each pixel is the mean of a
    /// square, bit-exact with Pillow's draft mode. The region refers to the image at that scale, whose sides are given
    /// by [`reduced`].
    ///
    /// Shapes and errors: as [`Self::decode`].
    ///
    /// # Panics
    /// For any other reduction.
    pub fn decode_reduced(&mut self, region: &Region, reduction: usize) -> Result<Vec<u8>, Damage> {
        assert!(
            [1, 2, 4, 8].contains(&reduction),
            "a reduction of {reduction}"
        );
        let components = self.frame.components.iter();
        let channels =
            components.map(|component| Channel::new(&self.frame, component, region, reduction));
        let mut channels: Vec<Channel> = channels.collect();
        let mut scan = self.scan.clone();
        loop {
            self.read_scan(&scan, &mut channels)?;
            scan = match self.segments.next(Some(&self.frame))? {
                Event::Scan(scan) => scan,
                Event::End => break,
                Event::Frame(_) => return Err(Damage::Damaged("more than one frame")),
            };
        }
        self.irregular |= !is_complete(&channels, self.frame.progressive)?;
        if self.frame.progressive {
            channels
                .iter_mut()
                .for_each(Channel::fill_from_coefficients);
        }
        Ok(self.to_rgb(&channels, region))
    }

    /// Decodes the data of a scan.
    fn read_scan(&mut self, scan: &Scan, channels: &mut [Channel]) -> Result<(), Damage> {
        for part in &scan.parts {
            let steps = self.frame.components[part.component].table;
            let channel = &mut channels[part.component];
            channel.steps = channel.steps.or(self.segments.tables.steps[steps]);
            if channel.steps.is_none() {
                return Err(Damage::Damaged("missing quantization table"));
            }
            follow(channel, scan, self.frame.progressive)?;
        }
        let tables = &self.segments.tables;
        let grid = grid(&self.frame, scan, channels, tables.restart);
        let (bytes, at) = (self.bytes, self.segments.at);
        let has_codes = |part: &Part| tables.dc[part.dc].is_some() && tables.ac[part.ac].is_some();
        self.irregular |= !self.frame.progressive && !scan.parts.iter().all(has_codes);
        self.segments.at = if !self.frame.progressive {
            let parts = with_channels(&scan.parts, channels);
            let streams = parts.zip(&grid.blocks).map(|((part, channel), (_, down))| {
                let usual = Tables::usual();
                let dc = code(&tables.dc, part.dc).or(code(&usual.dc, part.dc))?;
                let ac = code(&tables.ac, part.ac).or(code(&usual.ac, part.ac))?;
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

    /// Upsamples the components and converts them to RGB.
    fn to_rgb(&self, channels: &[Channel], region: &Region) -> Vec<u8> {
        let mut pixels = vec![0; 3 * region.width * region.height];
        let is_rgb = self.is_rgb();
        let mut works = [Work::default(), Work::default(), Work::default()];
        let lines = pixels.chunks_exact_mut(3 * region.width);
        for (y, line) in (region.top..).zip(lines) {
            let mut lines = channels.iter().zip(&mut works);
            let mut next = || {
                lines
                    .next()
                    .map(|(channel, work)| channel.pixels(y, region, work))
            };
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

    /// Returns whether three components are red, green and blue. Source: libjpeg-turbo's `jdapimin.c`.
    fn is_rgb(&self) -> bool {
        let ids = self.frame.components.iter().map(|component| component.id);
        match self.segments.adobe {
            _ if self.segments.jfif => false,
            Some(transform) => transform == 0,
            None => ids.eq(*b"RGB"),
        }
    }
}

/// Returns the length of an image's side at 1 / `reduction` of its scale.
pub fn reduced(side: usize, reduction: usize) -> usize {
    side.div_ceil(reduction)
}

/// Records which coefficients of a component a scan contains.
///
/// Errors: the scan repeats known bits, or an earlier bit is missing.
fn follow(channel: &mut Channel, scan: &Scan, progressive: bool) -> Result<(), Damage> {
    // A sequential scan contains all coefficients of a component, regardless of its header.
    let (range, before, low) = match progressive {
        true => (
            scan.first..=scan.last,
            (scan.high > 0).then_some(scan.high),
            scan.low,
        ),
        false => (0..=63, None, 0),
    };
    let known = &mut channel.known[range];
    if known.iter().any(|known| *known != before) {
        return Err(Damage::Damaged("scans are missing or repeated"));
    }
    known.fill(Some(low));
    Ok(())
}

/// The first coefficients. If they are not known to the last bit, libjpeg smooths blocks.
const SMOOTHED: usize = 10;
const LEFT_OUT: &str = "its scans omit low frequencies, or the file was truncated between scans";

/// Returns whether all coefficients are known. Those that the scans of a progressive file omit are zero.
///
/// Errors: parts of the image are missing, or libjpeg would estimate them by smoothing.
/// Source: libjpeg-turbo's `jdcoefct.c`, `smoothing_ok`.
fn is_complete(channels: &[Channel], progressive: bool) -> Result<bool, Damage> {
    let all = |range: Range<usize>, is: fn(Option<u8>) -> bool| {
        let mut known = channels
            .iter()
            .flat_map(|channel| &channel.known[range.clone()]);
        known.all(|known| is(*known))
    };
    let complete = all(0..64, |known| known == Some(0));
    if complete {
        return Ok(true);
    }
    if !progressive || !all(0..1, |known| known.is_some()) {
        return Err(Damage::Damaged("scans are missing"));
    }
    match all(1..SMOOTHED, |known| known == Some(0)) {
        true => Ok(false),
        false => Err(Damage::Unsupported(LEFT_OUT)),
    }
}

/// Returns the order of the blocks of a scan. Source: T.81, A.2.
fn grid(frame: &Frame, scan: &Scan, channels: &[Channel], restart: usize) -> Grid {
    if let [part] = scan.parts[..] {
        let all = &channels[part.component].all;
        let (columns, rows) = (all.columns.len(), all.rows.len());
        let blocks = vec![(1, 1)];
        return Grid {
            columns,
            rows,
            blocks,
            restart,
        };
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

/// Pairs the parts of a scan with their channels.
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
    table.ok_or(Damage::Damaged("missing Huffman table"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::tensor::SafeTensors;

    use super::*;

    /// Reproducible pseudorandom numbers (xorshift64*, Vigna 2016).
    struct Rng(u64);

    impl Rng {
        fn new(seed: u64, number: u64) -> Self {
            let mut rng = Self((seed << 32 | number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            rng.below(1);
            rng
        }

        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
        }
    }

    /// Loads name, shape and bytes of every tensor recorded by `tests/golden/make_pictures.py`.
    fn golden() -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        let bytes = std::fs::read(folder.join("jpeg_kinds.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors.tensors().into_iter();
        tensors
            .map(|(name, tensor)| (name, tensor.shape().to_vec(), tensor.data().to_vec()))
            .collect()
    }

    /// Name, file, height and width, and Pillow's pixels.
    type Kind = (String, Vec<u8>, [usize; 2], Vec<u8>);

    fn kinds() -> Vec<Kind> {
        let recorded = golden();
        let find = |name: String| {
            recorded
                .iter()
                .find(|(found, _, _)| *found == name)
                .unwrap()
        };
        let names = recorded
            .iter()
            .filter_map(|(name, _, _)| name.strip_suffix(" file"));
        let kind = |name: &str| {
            let (_, _, file) = find(format!("{name} file"));
            let (_, shape, pixels) = find(format!("{name} pixels"));
            (
                name.to_owned(),
                file.clone(),
                [shape[0], shape[1]],
                pixels.clone(),
            )
        };
        names.map(kind).collect()
    }

    fn file(name: &str) -> Vec<u8> {
        let kinds = kinds().into_iter();
        let mut found = kinds.filter(|(found, ..)| found == name);
        found.next().unwrap().1
    }

    /// Decodes the requested region. Images too large for a test count as damaged.
    fn decode(
        bytes: &[u8],
        region: impl Fn(usize, usize) -> Region,
    ) -> Result<(Region, Vec<u8>), Damage> {
        let rare = Damage::Damaged("a rare kind");
        let mut jpeg = Jpeg::open(bytes)?.ok_or(rare)?;
        let (width, height) = (jpeg.width(), jpeg.height());
        if width * height == 0 || width * height > 1 << 20 {
            return Err(Damage::Damaged("a size that is not for tests"));
        }
        let region = region(width, height);
        Ok((region, jpeg.decode(&region)?))
    }

    fn whole(bytes: &[u8]) -> Result<Vec<u8>, Damage> {
        Ok(decode(bytes, Region::whole)?.1)
    }

    fn random_region(rng: &mut Rng, width: usize, height: usize) -> Region {
        let (left, top) = (rng.below(width), rng.below(height));
        Region {
            left,
            top,
            width: 1 + rng.below(width - left),
            height: 1 + rng.below(height - top),
        }
    }

    #[test]
    fn every_kind_of_file_has_pillows_bytes() {
        let kinds = kinds();
        assert_eq!(kinds.len(), 33);
        for (name, file, [height, width], expected) in kinds {
            let (region, pixels) = decode(&file, Region::whole).unwrap();
            assert_eq!(region, Region::whole(width, height), "{name}");
            let differing = pixels.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert_eq!((pixels.len(), differing), (expected.len(), 0), "{name}");
        }
    }

    #[test]
    fn a_region_equals_that_part_of_the_whole_image() {
        for (name, file, [height, width], expected) in kinds() {
            for number in 0..30 {
                let mut rng = Rng::new(0, number);
                let asked = random_region(&mut rng, width, height);
                let (region, pixels) = decode(&file, |_, _| asked).unwrap();
                let lines = expected
                    .chunks_exact(3 * width)
                    .skip(region.top)
                    .take(region.height);
                let part = lines.flat_map(|line| &line[3 * region.left..][..3 * region.width]);
                assert!(pixels.iter().eq(part), "{name}, {region:?}");
            }
        }
    }

    #[test]
    fn reduced_images_have_the_bytes_of_pillows_draft_mode_in_any_region() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        let bytes = std::fs::read(folder.join("jpeg_reduced.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut count = 0;
        for (name, file, [height, width], _) in kinds() {
            for reduction in [2, 4, 8] {
                let Ok(expected) = tensors.tensor(&format!("{name} 1/{reduction}")) else {
                    continue;
                };
                count += 1;
                let [width, height] = [width, height].map(|side| reduced(side, reduction));
                assert_eq!(expected.shape(), [height, width, 3], "{name}");
                for number in 0..10 {
                    let region = match number {
                        0 => Region::whole(width, height),
                        _ => random_region(&mut Rng::new(2, number), width, height),
                    };
                    let mut jpeg = Jpeg::open(&file).unwrap().unwrap();
                    let found = jpeg.decode_reduced(&region, reduction).unwrap();
                    let lines = expected.data().chunks_exact(3 * width);
                    let lines = lines.skip(region.top).take(region.height);
                    let lines = lines.flat_map(|line| &line[3 * region.left..][..3 * region.width]);
                    assert!(
                        found.iter().eq(lines),
                        "{name} at 1/{reduction}, {region:?}"
                    );
                }
            }
        }
        assert!(count >= 80, "{count}");
    }

    #[test]
    fn a_file_cut_anywhere_is_reported_as_truncated() {
        for (name, file, ..) in kinds() {
            for length in 2..file.len() {
                let found = whole(&file[..length]);
                assert_eq!(
                    found,
                    Err(Damage::Truncated),
                    "{name} cut to {length} of {}",
                    file.len()
                );
            }
        }
    }

    /// Bits flipped, bytes overwritten, removed and duplicated: an error or an image, and the same for any region.
    #[test]
    fn damage_has_the_same_outcome_for_any_region() {
        let (mut errors, mut pictures) = (0, 0);
        for (name, file, ..) in kinds() {
            for number in 0..300 {
                let mut rng = Rng::new(1, number);
                let mut damaged = file.clone();
                for _ in 0..1 + rng.below(3) {
                    let place = 2 + rng.below(damaged.len() - 2);
                    let count = (1 + rng.below(20)).min(damaged.len() - place);
                    match rng.below(4) {
                        0 => damaged[place] ^= 1 << rng.below(8),
                        1 => damaged[place..][..count].fill_with(|| rng.below(256) as u8),
                        2 => drop(damaged.drain(place..place + count)),
                        _ => damaged.extend_from_within(place..),
                    }
                }
                let all = decode(&damaged, Region::whole);
                let region = std::cell::RefCell::new(rng);
                let part = decode(&damaged, |width, height| {
                    random_region(&mut region.borrow_mut(), width, height)
                });
                assert_eq!(all.as_ref().err(), part.as_ref().err(), "{name}, {number}");
                for (region, pixels) in all.iter().chain(&part) {
                    assert_eq!(pixels.len(), 3 * region.width * region.height);
                }
                *(if all.is_ok() {
                    &mut pictures
                } else {
                    &mut errors
                }) += 1;
            }
        }
        // Some damage is undetectable, such as a changed coefficient.
        assert!(
            errors > 5000 && pictures > 500,
            "{errors} errors, {pictures} pictures"
        );
    }

    fn find(file: &[u8], marker: u8) -> usize {
        let mut pairs = file.windows(2);
        pairs.position(|pair| pair == [0xff, marker]).unwrap()
    }

    fn damage(bytes: &[u8]) -> &'static str {
        match whole(bytes) {
            Err(Damage::Damaged(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn restart_markers_must_be_there_and_in_order() {
        let sound = file("restarts 420");
        let place = find(&sound, 0xd1);
        let mut swapped = sound.clone();
        swapped[place + 1] = 0xd3;
        assert!(damage(&swapped).contains("out of order"));
        let without = [&sound[..place], &sound[place + 2..]].concat();
        assert!(damage(&without).contains("a restart marker is late"));
        let early = [&sound[..place - 3], &sound[place..]].concat();
        assert!(damage(&early).contains("ends before the image"));
    }

    #[test]
    fn scans_must_be_complete() {
        for name in ["progressive 420", "progressive grey", "three scans"] {
            let sound = file(name);
            let last = sound
                .windows(2)
                .rposition(|pair| pair == [0xff, 0xda])
                .unwrap();
            let without = [&sound[..last], &[0xff, 0xd9]].concat();
            let expected = match name {
                "three scans" => Damage::Damaged("scans are missing"),
                // The last scan refines low frequencies, which libjpeg would estimate.
                _ => Damage::Unsupported(LEFT_OUT),
            };
            assert_eq!(whole(&without), Err(expected), "{name}");
            let twice = [&sound[..sound.len() - 2], &sound[last..]].concat();
            assert_eq!(damage(&twice), "scans are missing or repeated", "{name}");
        }
    }

    #[test]
    fn an_end_marker_inside_the_data_is_damage() {
        let sound = file("444");
        let middle = (find(&sound, 0xda) + sound.len()) / 2;
        let ended = [&sound[..middle], &[0xff, 0xd9]].concat();
        assert!(damage(&ended).contains("ends before the image"));
    }

    /// A grayscale block whose mean has code 0 (no difference) and whose other coefficients have code 0 as well.
    fn by_hand(other: u8, data: &[u8]) -> Vec<u8> {
        let codes = |class: u8, symbol: u8| {
            let counts = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            [&[0xff, 0xc4, 0, 20, class][..], &counts, &[symbol]].concat()
        };
        [
            &[0xff, 0xd8, 0xff, 0xdb, 0, 67, 0][..],
            &[1; 64],
            &[0xff, 0xc0, 0, 11, 8, 0, 8, 0, 8, 1, 7, 0x11, 0],
            &codes(0x00, 0),
            &codes(0x10, other),
            &[0xff, 0xda, 0, 8, 1, 7, 0x00, 0, 63, 0],
            data,
            &[0xff, 0xd9],
        ]
        .concat()
    }

    #[test]
    fn invalid_codes_and_coefficients_are_refused() {
        // 0 for the mean, 0 for the end of the block.
        assert_eq!(whole(&by_hand(0x00, &[0x3f])), Ok(vec![128; 192]));
        assert!(damage(&by_hand(0x00, &[0x7f])).contains("invalid Huffman code"));
        // 15 zeros and a value of one bit, four times: the last is coefficient 64.
        assert!(damage(&by_hand(0xf1, &[0x00, 0x00])).contains("too many coefficients"));
        // 16 zeros, four times.
        assert!(damage(&by_hand(0xf0, &[0x00])).contains("too many coefficients"));
        // A run of zeros without a value after it.
        assert!(damage(&by_hand(0x30, &[0x00])).contains("invalid Huffman code"));
    }

    #[test]
    fn a_few_bytes_after_the_data_are_accepted_and_many_are_damage() {
        assert!(whole(&by_hand(0x00, &[0x3f; 20])).is_ok());
        assert!(damage(&by_hand(0x00, &[0x3f; 40])).contains("left over"));
    }

    #[test]
    fn rare_kinds_are_left_to_another_decoder() {
        let mut arithmetic = by_hand(0x00, &[0x3f]);
        let place = find(&arithmetic, 0xc0);
        arithmetic[place + 1] = 0xc9;
        assert!(Jpeg::open(&arithmetic).unwrap().is_none());
        let mut twelve_bits = by_hand(0x00, &[0x3f]);
        twelve_bits[place + 4] = 12;
        assert!(Jpeg::open(&twelve_bits).unwrap().is_none());
    }
}
