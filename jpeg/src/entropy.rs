//! The entropy-coded data of a scan: restart intervals, and the order of the blocks in them.
//!
//! [`super::sequential`] and [`super::progressive`] decode the bits of a block.
//!
//! Source: ITU T.81, A.2 (order of blocks), B.1.1.5 (stuffed bytes), E.2.4 (restarts).

use super::damage::Damage;
use super::huffman::{Bits, PADDING};

/// Bytes that may be left over after the last block of a scan. Camera firmware leaves a few, which all decoders accept;
/// more mean that blocks were lost.
const MOST_LEFT: usize = 32;

/// Decodes the blocks of a scan.
pub(super) trait Coder {
    /// Decodes the next block of a part of the scan: block `(column, row)` of the component.
    fn block(&mut self, bits: &mut Bits, part: usize, at: (usize, usize)) -> Result<(), Damage>;

    /// Resets the state at the end of a restart interval.
    fn restart(&mut self) -> Result<(), Damage>;

    /// Handles the end of a row of MCUs.
    fn end_row(&mut self, row: usize);
}

/// The order of the blocks of a scan.
pub(super) struct Grid {
    /// Number of MCUs across and down.
    pub columns: usize,
    pub rows: usize,
    /// Blocks of each part in an MCU, across and down.
    pub blocks: Vec<(usize, usize)>,
    /// MCUs between two restart markers, or 0 if there are none.
    pub restart: usize,
}

/// Decodes all blocks of the scan whose data starts at offset `at`. Returns the offset after the data.
///
/// Errors: data that ends early or late, invalid codes, restart markers that are missing or out of order. If no marker
/// follows the data, the file is truncated, and no other error is reported.
pub(super) fn read<C: Coder>(
    bytes: &[u8],
    at: usize,
    grid: &Grid,
    coder: &mut C,
) -> Result<usize, Damage> {
    let mut end = at;
    match read_blocks(bytes, &mut end, grid, coder) {
        Ok(()) => Ok(end),
        Err(_) if end == bytes.len() => Err(Damage::Truncated),
        Err(damage) => Err(damage),
    }
}

/// Decodes all blocks. `end` is the offset of the data at first, then the offset after the current interval.
fn read_blocks<C: Coder>(
    bytes: &[u8],
    end: &mut usize,
    grid: &Grid,
    coder: &mut C,
) -> Result<(), Damage> {
    let mut padded = Vec::new();
    *end = interval(bytes, *end, &mut padded);
    let mut bits = Bits::new(&padded);
    let (mut to_restart, mut restarts) = (grid.restart, 0);
    for row in 0..grid.rows {
        for column in 0..grid.columns {
            if grid.restart > 0 {
                if to_restart == 0 {
                    if bits.left()? > 0 {
                        return Err(Damage::Damaged("a restart marker is late"));
                    }
                    coder.restart()?;
                    let begin = restart(bytes, *end, restarts)?;
                    *end = interval(bytes, begin, &mut padded);
                    bits = Bits::new(&padded);
                    (to_restart, restarts) = (grid.restart, restarts + 1);
                }
                to_restart -= 1;
            }
            for (part, (across, down)) in grid.blocks.iter().enumerate() {
                for y in 0..*down {
                    for x in 0..*across {
                        let at = (column * across + x, row * down + y);
                        coder.block(&mut bits, part, at)?;
                    }
                }
            }
        }
        bits.left()?;
        coder.end_row(row);
    }
    if bits.left()? > MOST_LEFT {
        return Err(Damage::Damaged("compressed data is left over"));
    }
    coder.restart()
}

/// Expects restart marker `number` at an offset and returns the offset after it.
fn restart(bytes: &[u8], at: usize, number: usize) -> Result<usize, Damage> {
    match bytes.get(at..at + 2) {
        Some([0xff, marker]) if usize::from(*marker) == 0xd0 + number % 8 => Ok(at + 2),
        _ => Err(Damage::Damaged(
            "a restart marker is missing or out of order",
        )),
    }
}

/// Copies the data from an offset up to a marker, removing stuffed bytes and padding with zeros. Returns the offset of
/// the marker, or the end of the file.
fn interval(bytes: &[u8], mut at: usize, padded: &mut Vec<u8>) -> usize {
    padded.clear();
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let plain = find_ff(rest).unwrap_or(rest.len());
        padded.extend_from_slice(&rest[..plain]);
        at += plain;
        // Any number of 0xff may precede a marker, or the 0 that marks a stuffed byte.
        let run = bytes.get(at..).unwrap_or_default();
        let run = run
            .iter()
            .position(|byte| *byte != 0xff)
            .map(|run| at + run);
        match run {
            Some(end) if bytes[end] == 0 => {
                padded.push(0xff);
                at = end + 1;
            }
            Some(end) => {
                at = end - 1;
                break;
            }
            None => {
                at = bytes.len();
                break;
            }
        }
    }
    padded.extend([0; PADDING]);
    at
}

/// Returns the offset of the first 0xff. Searches 32 bytes at a time, which the compiler vectorizes.
pub fn find_ff(bytes: &[u8]) -> Option<usize> {
    let pieces = bytes.chunks(32);
    let with = pieces.enumerate().find(|(_, piece)| {
        let found = piece
            .iter()
            .fold(0, |found, byte| found | u8::from(*byte == 0xff));
        found != 0
    });
    let (number, piece) = with?;
    Some(number * 32 + piece.iter().position(|byte| *byte == 0xff)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_ends_at_a_marker_and_stuffed_bytes_are_values() {
        let mut padded = Vec::new();
        let bytes = [9, 1, 0xff, 0, 2, 0xff, 0xff, 0, 3, 0xff, 0xff, 0xd0, 4];
        assert_eq!(interval(&bytes, 1, &mut padded), 10);
        assert_eq!(padded, [&[1, 0xff, 2, 0xff, 3], &[0; PADDING][..]].concat());
        assert_eq!(restart(&bytes, 10, 8), Ok(12));
        assert!(matches!(restart(&bytes, 10, 1), Err(Damage::Damaged(_))));
        assert_eq!(interval(&bytes, 12, &mut padded), 13);
        assert!(matches!(restart(&bytes, 13, 0), Err(Damage::Damaged(_))));
    }

    #[test]
    fn the_first_ff_is_found_wherever_it_is() {
        for place in 0..100 {
            let mut bytes = [0xfe; 100];
            bytes[place..].fill(0xff);
            assert_eq!(find_ff(&bytes), Some(place));
        }
        assert_eq!(find_ff(&[0; 70]), None);
    }
}
