//! Bits of entropy-coded data, and the Huffman codes in them.
//!
//! Source: ITU T.81, annexes C and F.2.2.

use super::damage::Damage;

/// Bits by which codes are looked up at once. Longer codes, a few in a hundred, are searched by their length.
const FAST: u32 = 10;

/// What a code means.
///
/// Bits 0-7: those of the code and of the value that follows it. 8-15: those of the code alone, 0 for no code.
/// 16-23: those of the value. 24-31: the zeros before it.
#[derive(Clone, Copy)]
pub(super) struct Meaning(u32);

impl Meaning {
    fn new(length: u32, symbol: u8) -> Self {
        let (zeros, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        Self((length + size) | length << 8 | size << 16 | zeros << 24)
    }

    /// Bits of code and value.
    #[inline(always)]
    pub(super) fn total(self) -> u32 {
        self.0 & 0xff
    }

    /// Bits of the code; 0 if there is no such code.
    #[inline(always)]
    pub(super) fn length(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Bits of the value.
    #[inline(always)]
    pub(super) fn size(self) -> u32 {
        self.0 >> 16 & 0xff
    }

    /// Zero coefficients before the value.
    #[inline(always)]
    pub(super) fn zeros(self) -> usize {
        (self.0 >> 24) as usize
    }
}

/// A code with the value that follows it, where both together have at most [`FAST`] bits.
///
/// Bits 0-7: those of both. 8-15: the zeros before it. 16-31: the value, 0 for all else.
#[derive(Clone, Copy)]
pub(super) struct Short(u32);

impl Short {
    fn new(meaning: Meaning, next: u32) -> Self {
        let (size, total) = (meaning.size(), meaning.total());
        if size == 0 || total > FAST {
            return Self(0);
        }
        let bits = (next >> (FAST - total)) as i32 & ((1 << size) - 1);
        let value = if bits >> (size - 1) == 0 {
            bits + 1 - (1 << size)
        } else {
            bits
        };
        Self(total | (meaning.zeros() as u32) << 8 | (value as u32) << 16)
    }

    /// Bits of code and value.
    #[inline(always)]
    pub(super) fn total(self) -> u32 {
        self.0 & 0xff
    }

    /// Zero coefficients before the value.
    #[inline(always)]
    pub(super) fn zeros(self) -> usize {
        (self.0 >> 8 & 0xff) as usize
    }

    /// The value; 0 if it is not this short.
    #[inline(always)]
    pub(super) fn value(self) -> i16 {
        (self.0 >> 16) as i16
    }
}

/// A table of codes.
pub(super) struct HuffmanTable {
    /// By the next [`FAST`] bits, the short ones with their values: nine of ten.
    short: [Short; 1 << FAST],
    /// By the next [`FAST`] bits.
    fast: [Meaning; 1 << FAST],
    /// For each length the first 16 bits that are above its codes.
    above: [u32; 17],
    /// For each length, what to add to a code for its place in `symbols`.
    offset: [i32; 17],
    symbols: [u8; 256],
}

impl HuffmanTable {
    /// From the number of codes of each length and what they mean; none if they are no such code.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let mut table = Self {
            short: [Short(0); 1 << FAST],
            fast: [Meaning(0); 1 << FAST],
            above: [0; 17],
            offset: [0; 17],
            symbols: [0; 256],
        };
        table
            .symbols
            .get_mut(..symbols.len())?
            .copy_from_slice(symbols);
        let (mut code, mut place) = (0_u32, 0_usize);
        for (length, count) in (1_u32..).zip(counts) {
            table.offset[length as usize] = place as i32 - code as i32;
            for symbol in &symbols[place..][..usize::from(*count)] {
                if length <= FAST {
                    let share = 1 << (FAST - length);
                    let range = table
                        .fast
                        .get_mut(code as usize * share..)?
                        .get_mut(..share)?;
                    range.fill(Meaning::new(length, *symbol));
                }
                code += 1;
            }
            // No code is all ones.
            if *count > 0 && code >= 1 << length {
                return None;
            }
            place += usize::from(*count);
            table.above[length as usize] = code << (16 - length);
            code <<= 1;
        }
        for (next, (short, meaning)) in (0..).zip(table.short.iter_mut().zip(&table.fast)) {
            *short = Short::new(*meaning, next);
        }
        Some(table)
    }

    /// The code and value that come next, if they are short. At least [`FAST`] bits must be there.
    #[inline(always)]
    pub(super) fn look_up_short(&self, bits: &Bits) -> Short {
        self.short[bits.peek(FAST) as usize]
    }

    /// What the next bits mean, for the caller to consume; a meaning without length if they are no code.
    #[inline(always)]
    pub(super) fn look_up(&self, bits: &Bits) -> Meaning {
        let found = self.fast[bits.peek(FAST) as usize];
        if found.length() != 0 {
            found
        } else {
            self.search(bits.peek(16))
        }
    }

    #[cold]
    #[inline(never)]
    fn search(&self, next: u32) -> Meaning {
        let longer = FAST as usize + 1..=16;
        let Some(length) = longer.into_iter().find(|length| next < self.above[*length]) else {
            return Meaning(0);
        };
        let code = (next >> (16 - length)) as i32;
        let place = code + self.offset[length];
        let symbol = usize::try_from(place)
            .ok()
            .and_then(|place| self.symbols.get(place));
        symbol.map_or(Meaning(0), |symbol| Meaning::new(length as u32, *symbol))
    }
}

/// The bits of one restart interval, from the first.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    /// The data without stuffed bytes and with [`PADDING`] zeros behind them.
    padded: &'a [u8],
    /// Place of the next byte that is not in `buffer`.
    at: usize,
    /// The next bits, the first on top.
    buffer: u64,
    /// How many of them there are.
    count: u32,
}

/// Zeros behind the data, so that eight bytes can always be taken.
pub(super) const PADDING: usize = 8;

impl<'a> Bits<'a> {
    pub(super) fn new(padded: &'a [u8]) -> Self {
        Self {
            padded,
            at: 0,
            buffer: 0,
            count: 0,
        }
    }

    /// At least 32 bits are there afterwards: a code and its value. Behind the data they are zeros.
    #[inline(always)]
    pub(super) fn fill(&mut self) {
        self.fill_below(32);
    }

    /// At least [`FAST`] bits are there afterwards.
    #[inline(always)]
    pub(super) fn fill_short(&mut self) {
        self.fill_below(FAST);
    }

    #[inline(always)]
    fn fill_below(&mut self, least: u32) {
        if self.count < least {
            let next = self.padded.get(self.at..).and_then(<[u8]>::first_chunk);
            self.buffer |= next.map_or(0, |bytes| u64::from_be_bytes(*bytes)) >> self.count;
            // Whole bytes that found room; the bits of a further one are there, but not counted.
            self.at += ((63 - self.count) >> 3) as usize;
            self.count |= 56;
        }
    }

    /// The next bits, 1 to 32.
    #[inline(always)]
    fn peek(&self, count: u32) -> u32 {
        (self.buffer >> (64 - count)) as u32
    }

    /// Leaves out bits that are there.
    #[inline(always)]
    pub(super) fn consume(&mut self, count: u32) {
        self.buffer <<= count & 63;
        self.count -= count;
    }

    /// The value that follows a code, of the code's size: T.81, F.2.2.1, `EXTEND`.
    #[inline(always)]
    pub(super) fn value(&self, meaning: Meaning) -> i32 {
        let (bits, size) = (self.buffer << (meaning.length() & 63), meaning.size());
        let number = (bits >> 1 >> (63 - size)) as i32;
        // A first bit of 0 means a negative value.
        let negative = !((bits as i64 >> 63) as i32);
        number + (negative & (1 - (1 << size)))
    }

    /// The next bits as a number, 0 to 16 of those that are there.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let number = (self.buffer >> 1 >> (63 - count)) as u32;
        self.consume(count);
        number
    }

    /// Bytes that are left, without the one that was begun; an error if more was taken than there is.
    pub(super) fn left(&self) -> Result<usize, Damage> {
        let consumed = (self.at * 8 - self.count as usize).div_ceil(8);
        let left = (self.padded.len() - PADDING).checked_sub(consumed);
        left.ok_or(Damage::Damaged(
            "the compressed data end before the picture",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths 1, 2 and 12; what is left of the codes has no meaning.
    fn table() -> HuffmanTable {
        let mut counts = [0; 16];
        (counts[0], counts[1], counts[11]) = (1, 1, 2);
        HuffmanTable::new(&counts, &[0x03, 0x12, 0x21, 0x00]).unwrap()
    }

    fn next(bits: &mut Bits) -> (u32, i32) {
        bits.fill();
        let meaning = table().look_up(bits);
        let value = bits.value(meaning);
        bits.consume(meaning.total());
        (meaning.length(), value)
    }

    #[test]
    fn codes_and_values_are_read_one_after_the_other() {
        // 0 101 | 10 01 | 110000000000 1 | 0 000 | 111...
        let data = [
            0b0101_1001,
            0b1100_0000,
            0b0000_1000,
            0b0111_1111,
            0xff,
            0xff,
            0xff,
        ];
        let padded = [&data[..], &[0; PADDING]].concat();
        let mut bits = Bits::new(&padded);
        assert_eq!(next(&mut bits), (1, 5));
        assert_eq!(next(&mut bits), (2, -2));
        assert_eq!(next(&mut bits), (12, 1));
        assert_eq!(next(&mut bits), (1, -7));
        assert_eq!(bits.left(), Ok(3));
        assert_eq!(next(&mut bits), (0, 0));
    }

    #[test]
    fn bits_behind_the_data_are_zeros_and_noticed() {
        let padded = [&[0x00], &[0; PADDING][..]].concat();
        let mut bits = Bits::new(&padded);
        assert_eq!((next(&mut bits), bits.left()), ((1, -7), Ok(0)));
        assert_eq!((next(&mut bits), bits.left()), ((1, -7), Ok(0)));
        for _ in 0..100 {
            next(&mut bits);
            assert!(bits.left().is_err());
        }
    }

    #[test]
    fn codes_that_cannot_be_told_apart_are_refused() {
        let table = |first: u8, second: u8| {
            let mut counts = [0; 16];
            (counts[0], counts[1]) = (first, second);
            HuffmanTable::new(&counts, &vec![1; usize::from(first) + usize::from(second)])
        };
        assert!(table(1, 1).is_some());
        // All ones, and more codes than there are.
        assert!(table(1, 2).is_none());
        assert!(table(2, 0).is_none());
        assert!(table(0, 9).is_none());
    }
}
