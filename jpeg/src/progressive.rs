//! Blocks of progressive scans. Each scan adds coefficients, or one more bit to coefficients of earlier scans.
//!
//! All coefficients of the image are kept until the last scan is read, whether the region needs them or not, because
//! the meaning of the bits in later scans depends on them.
//!
//! Source: ITU T.81, G.1.2 and G.2.

use advxl_kernels::jpeg::Block;

use super::channel::Channel;
use super::damage::Damage;
use super::entropy::Coder;
use super::header::{NATURAL, Scan};
use super::huffman::{Bits, HuffmanTable};
use super::sequential::{MEAN, NO_CODE, TOO_MANY};

/// A first or later scan of the means (DC coefficients) of blocks.
pub(super) struct Means<'a> {
    /// Each with the mean of the previous block.
    pub parts: Vec<(Option<&'a HuffmanTable>, &'a mut Channel, i32)>,
    pub low: u8,
}

impl Coder for Means<'_> {
    #[inline]
    fn block(&mut self, bits: &mut Bits, part: usize, at: (usize, usize)) -> Result<(), Damage> {
        let (table, channel, mean) = &mut self.parts[part];
        bits.fill();
        let block = channel.block_mut(at);
        let Some(table) = table else {
            let bit = bits.take(1) as i16;
            if let Some(block) = block {
                block[0] |= bit << self.low;
            }
            return Ok(());
        };
        let difference = table.look_up(bits);
        if difference.length() == 0 || difference.zeros() > 0 {
            return Err(NO_CODE);
        }
        *mean += bits.value(difference);
        bits.consume(difference.total());
        let value = i16::try_from(*mean << self.low).map_err(|_| MEAN)?;
        if let Some(block) = block {
            block[0] = value;
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Damage> {
        self.parts.iter_mut().for_each(|(_, _, mean)| *mean = 0);
        Ok(())
    }

    fn end_row(&mut self, _: usize) {}
}

/// A first or later scan of the other (AC) coefficients of one component.
pub(super) struct Others<'a> {
    table: &'a HuffmanTable,
    channel: &'a mut Channel,
    scan: &'a Scan,
    /// Number of following blocks without further codes.
    empty: u32,
}

impl<'a> Others<'a> {
    pub(super) fn new(table: &'a HuffmanTable, channel: &'a mut Channel, scan: &'a Scan) -> Self {
        Self {
            table,
            channel,
            scan,
            empty: 0,
        }
    }
}

impl Coder for Others<'_> {
    #[inline]
    fn block(&mut self, bits: &mut Bits, _: usize, at: (usize, usize)) -> Result<(), Damage> {
        let Some(block) = self.channel.block_mut(at) else {
            return Ok(());
        };
        match self.scan.high {
            0 => first(bits, self.table, self.scan, &mut self.empty, block),
            _ => refine(bits, self.table, self.scan, &mut self.empty, block),
        }
    }

    fn restart(&mut self) -> Result<(), Damage> {
        match self.empty {
            0 => Ok(()),
            _ => Err(Damage::Damaged(
                "more blocks are marked as empty than exist",
            )),
        }
    }

    fn end_row(&mut self, _: usize) {}
}

/// Decodes the first bits of coefficients.
#[inline(always)]
fn first(
    bits: &mut Bits,
    table: &HuffmanTable,
    scan: &Scan,
    empty: &mut u32,
    block: &mut Block,
) -> Result<(), Damage> {
    if *empty > 0 {
        *empty -= 1;
        return Ok(());
    }
    let mut k = scan.first;
    while k <= scan.last {
        bits.fill();
        let found = table.look_up(bits);
        if found.length() == 0 {
            return Err(NO_CODE);
        }
        if found.size() == 0 {
            bits.consume(found.length());
            if found.zeros() < 15 {
                let more = found.zeros() as u32;
                *empty = (1 << more) + bits.take(more) - 1;
                return Ok(());
            }
            k += 16;
            continue;
        }
        k += found.zeros();
        let Some(place) = NATURAL.get(k) else {
            return Err(TOO_MANY);
        };
        block[usize::from(*place) & 63] = (bits.value(found) << scan.low) as i16;
        bits.consume(found.total());
        k += 1;
    }
    if k > scan.last + 1 {
        Err(TOO_MANY)
    } else {
        Ok(())
    }
}

/// Decodes one more bit of coefficients, including coefficients that become nonzero with this bit.
#[inline(always)]
fn refine(
    bits: &mut Bits,
    table: &HuffmanTable,
    scan: &Scan,
    empty: &mut u32,
    block: &mut Block,
) -> Result<(), Damage> {
    let bit = 1_i16 << scan.low;
    let mut k = scan.first;
    if *empty == 0 {
        while k <= scan.last {
            bits.fill();
            let found = table.look_up(bits);
            if found.length() == 0 || found.size() > 1 {
                return Err(NO_CODE);
            }
            bits.consume(found.length());
            let mut zeros = found.zeros();
            let mut value = 0;
            if found.size() == 1 {
                value = if bits.take(1) == 1 { bit } else { -bit };
            } else if zeros < 15 {
                *empty = (1 << zeros) + bits.take(zeros as u32);
                break;
            }
            loop {
                let Some(place) = NATURAL.get(k).filter(|_| k <= scan.last) else {
                    return Err(TOO_MANY);
                };
                let coefficient = &mut block[usize::from(*place) & 63];
                k += 1;
                if *coefficient != 0 {
                    correct(bits, coefficient, bit);
                } else if zeros == 0 {
                    *coefficient = value;
                    break;
                } else {
                    zeros -= 1;
                }
            }
        }
    }
    if *empty > 0 {
        for place in &NATURAL[k..=scan.last] {
            let coefficient = &mut block[usize::from(*place) & 63];
            if *coefficient != 0 {
                correct(bits, coefficient, bit);
            }
        }
        *empty -= 1;
    }
    Ok(())
}

/// Reads the next bit of a nonzero coefficient.
#[inline(always)]
fn correct(bits: &mut Bits, coefficient: &mut i16, bit: i16) {
    bits.fill();
    if bits.take(1) == 1 && *coefficient & bit == 0 {
        *coefficient += if *coefficient > 0 { bit } else { -bit };
    }
}
