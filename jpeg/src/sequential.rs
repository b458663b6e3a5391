//! Blocks of baseline and extended sequential scans. Each block is complete when read, so a row of blocks is
//! transformed to samples before the next row is read.
//!
//! Source: ITU T.81, F.2.2.

use advxl_kernels::jpeg::Block;

use super::channel::Channel;
use super::damage::Damage;
use super::entropy::Coder;
use super::header::NATURAL;
use super::huffman::{Bits, HuffmanTable};

/// A component in a scan.
pub(super) struct Stream<'a> {
    pub dc: &'a HuffmanTable,
    pub ac: &'a HuffmanTable,
    pub channel: &'a mut Channel,
    /// Rows of blocks in an MCU.
    pub down: usize,
    /// Mean of the previous block, in quantization steps.
    mean: i32,
    /// The wanted blocks of a row of MCUs, row by row.
    blocks: Vec<Block>,
}

impl<'a> Stream<'a> {
    pub(super) fn new(
        dc: &'a HuffmanTable,
        ac: &'a HuffmanTable,
        channel: &'a mut Channel,
        down: usize,
    ) -> Self {
        Self {
            dc,
            ac,
            down,
            mean: 0,
            blocks: vec![[0; 64]; down * channel.wanted.columns.len()],
            channel,
        }
    }
}

pub(super) struct Sequential<'a> {
    pub streams: Vec<Stream<'a>>,
}

impl Coder for Sequential<'_> {
    #[inline(always)]
    fn block(
        &mut self,
        bits: &mut Bits,
        part: usize,
        (column, row): (usize, usize),
    ) -> Result<(), Damage> {
        let stream = &mut self.streams[part];
        let wanted = &stream.channel.wanted;
        let (dc, ac, mean) = (stream.dc, stream.ac, &mut stream.mean);
        if wanted.columns.contains(&column) && wanted.rows.contains(&row) {
            let place = row % stream.down * wanted.columns.len() + column - wanted.columns.start;
            let block = &mut stream.blocks[place];
            block.fill(0);
            return read_block::<true>(bits, dc, ac, mean, block);
        }
        read_block::<false>(bits, dc, ac, mean, &mut [0; 64])
    }

    fn restart(&mut self) -> Result<(), Damage> {
        self.streams.iter_mut().for_each(|stream| stream.mean = 0);
        Ok(())
    }

    fn end_row(&mut self, row: usize) {
        for stream in &mut self.streams {
            let columns = stream.channel.wanted.columns.len().max(1);
            for (down, blocks) in stream.blocks.chunks_exact(columns).enumerate() {
                stream.channel.fill_row(row * stream.down + down, blocks);
            }
        }
    }
}

/// Decodes one block. The coefficients are written only if `KEEP` is set.
#[inline(always)]
fn read_block<const KEEP: bool>(
    bits: &mut Bits,
    dc: &HuffmanTable,
    ac: &HuffmanTable,
    mean: &mut i32,
    block: &mut Block,
) -> Result<(), Damage> {
    // A local copy stays in registers.
    let mut next = *bits;
    next.fill();
    let difference = dc.look_up(&next);
    if difference.length() == 0 || difference.zeros() > 0 {
        return Err(NO_CODE);
    }
    *mean += next.value(difference);
    next.consume(difference.total());
    let value = i16::try_from(*mean).map_err(|_| MEAN)?;
    if KEEP {
        block[0] = value;
    }
    let mut k = 1;
    while k < 64 {
        next.fill_short();
        let short = ac.look_up_short(&next);
        let (mut zeros, mut value, mut total) = (short.zeros(), short.value(), short.total());
        if value == 0 {
            next.fill();
            let found = ac.look_up(&next);
            if found.size() == 0 {
                match (found.length(), found.zeros()) {
                    (0, _) | (_, 1..=14) => return Err(NO_CODE),
                    (length, zeros) => {
                        next.consume(length);
                        if zeros == 0 {
                            break;
                        }
                        k += 16;
                        continue;
                    }
                }
            }
            (zeros, value, total) = (found.zeros(), next.value(found) as i16, found.total());
        }
        k += zeros;
        let Some(place) = NATURAL.get(k) else {
            return Err(TOO_MANY);
        };
        if KEEP {
            block[usize::from(*place) & 63] = value;
        }
        next.consume(total);
        k += 1;
    }
    *bits = next;
    if k > 64 { Err(TOO_MANY) } else { Ok(()) }
}

pub(super) const NO_CODE: Damage = Damage::Damaged("invalid Huffman code");
pub(super) const TOO_MANY: Damage = Damage::Damaged("a block has too many coefficients");
pub(super) const MEAN: Damage = Damage::Damaged("the mean of a block is out of range");
