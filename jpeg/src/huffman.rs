//! Bit reader and Huffman decoder for entropy-coded data.
//!
//! Source: ITU T.81, annexes C and F.2.2.

use super::damage::Damage;

/// Codes up to this many bits are looked up in a table. Longer codes, a few percent, are searched by length.
const FAST: u32 = 10;

/// The meaning of a code.
///
/// Bits 0-7: length of the code and of the value that follows it. 8-15: length of the code alone, 0 for no code.
/// 16-23: length of the value. 24-31: number of zeros before it.
#[derive(Clone, Copy)]
pub(super) struct Meaning(u32);

impl Meaning {
    fn new(length: u32, symbol: u8) -> Self {
        let (zeros, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        Self((length + size) | length << 8 | size << 16 | zeros << 24)
    }

    /// Returns the length of code and value.
    #[inline(always)]
    pub(super) fn total(self) -> u32 {
        self.0 & 0xff
    }

    /// Returns the length of the code, or 0 for an invalid code.
    #[inline(always)]
    pub(super) fn length(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Returns the length of the value.
    #[inline(always)]
    pub(super) fn size(self) -> u32 {
        self.0 >> 16 & 0xff
    }

    /// Returns the number of zero coefficients before the value.
    #[inline(always)]
    pub(super) fn zeros(self) -> usize {
        (self.0 >> 24) as usize
    }
}

/// A code with the value that follows it, if both together have at most [`FAST`] bits.
///
/// Bits 0-7: length of both. 8-15: number of zeros before the value. 16-31: the value, or 0 for everything else.
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

    /// Returns the length of code and value.
    #[inline(always)]
    pub(super) fn total(self) -> u32 {
        self.0 & 0xff
    }

    /// Returns the number of zero coefficients before the value.
    #[inline(always)]
    pub(super) fn zeros(self) -> usize {
        (self.0 >> 8 & 0xff) as usize
    }

    /// Returns the value, or 0 if the code is not this short.
    #[inline(always)]
    pub(super) fn value(self) -> i16 {
        (self.0 >> 16) as i16
    }
}

/// A table of Huffman codes.
pub(super) struct HuffmanTable {
    /// Short codes with their values, nine in ten, indexed by the next [`FAST`] bits.
    short: [Short; 1 << FAST],
    /// Codes indexed by the next [`FAST`] bits.
    fast: [Meaning; 1 << FAST],
    /// For each length, the first 16-bit value above its codes.
    above: [u32; 17],
    /// For each length, the difference between a code's index in `symbols` and the code.
    offset: [i32; 17],
    symbols: [u8; 256],
}

impl HuffmanTable {
    /// Builds a table from the number of codes of each length and their symbols. Returns `None` if the codes are
    /// invalid.
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
            // A code of all ones is not allowed.
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

    /// Returns the next code and value, if they are short. At least [`FAST`] bits must be buffered.
    #[inline(always)]
    pub(super) fn look_up_short(&self, bits: &Bits) -> Short {
        self.short[bits.peek(FAST) as usize]
    }

    /// Returns the meaning of the next bits, which the caller consumes. Its length is 0 if they are not a code.
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
    /// The data without stuffed bytes, followed by [`PADDING`] zeros.
    padded: &'a [u8],
    /// Offset of the next byte that is not in `buffer`.
    at: usize,
    /// The next bits, starting at the most significant.
    buffer: u64,
    /// Number of valid bits in `buffer`.
    count: u32,
}

/// Zeros after the data, so that eight bytes can always be read.
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

    /// Buffers at least 32 bits: a code and its value. Past the end of the data they are zeros.
    #[inline(always)]
    pub(super) fn fill(&mut self) {
        self.fill_below(32);
    }

    /// Buffers at least [`FAST`] bits.
    #[inline(always)]
    pub(super) fn fill_short(&mut self) {
        self.fill_below(FAST);
    }

    #[inline(always)]
    fn fill_below(&mut self, least: u32) {
        if self.count < least {
            let next = self.padded.get(self.at..).and_then(<[u8]>::first_chunk);
            self.buffer |= next.map_or(0, |bytes| u64::from_be_bytes(*bytes)) >> self.count;
            // Counts whole bytes only, though some bits of the next byte are buffered too.
            self.at += ((63 - self.count) >> 3) as usize;
            self.count |= 56;
        }
    }

    /// Returns the next 1 to 32 bits without consuming them.
    #[inline(always)]
    fn peek(&self, count: u32) -> u32 {
        (self.buffer >> (64 - count)) as u32
    }

    /// Consumes buffered bits.
    #[inline(always)]
    pub(super) fn consume(&mut self, count: u32) {
        self.buffer <<= count & 63;
        self.count -= count;
    }

    /// Returns the value that follows a code: T.81, F.2.2.1, `EXTEND`.
    #[inline(always)]
    pub(super) fn value(&self, meaning: Meaning) -> i32 {
        let (bits, size) = (self.buffer << (meaning.length() & 63), meaning.size());
        let number = (bits >> 1 >> (63 - size)) as i32;
        // A first bit of 0 means a negative value.
        let negative = !((bits as i64 >> 63) as i32);
        number + (negative & (1 - (1 << size)))
    }

    /// Consumes 0 to 16 buffered bits and returns them as a number.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let number = (self.buffer >> 1 >> (63 - count)) as u32;
        self.consume(count);
        number
    }

    /// Returns the number of remaining bytes, without a partly consumed one.
    ///
    /// Errors: more bits were consumed than the data has.
    pub(super) fn left(&self) -> Result<usize, Damage> {
        let consumed = (self.at * 8 - self.count as usize).div_ceil(8);
        let left = (self.padded.len() - PADDING).checked_sub(consumed);
        left.ok_or(Damage::Damaged("the compressed data ends before the image"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of lengths 1, 2 and 12; the remaining codes are unused.
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
    fn bits_past_the_data_are_zeros_and_detected() {
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
    fn ambiguous_codes_are_refused() {
        let table = |first: u8, second: u8| {
            let mut counts = [0; 16];
            (counts[0], counts[1]) = (first, second);
            HuffmanTable::new(&counts, &vec![1; usize::from(first) + usize::from(second)])
        };
        assert!(table(1, 1).is_some());
        // A code of all ones, and more codes than possible.
        assert!(table(1, 2).is_none());
        assert!(table(2, 0).is_none());
        assert!(table(0, 9).is_none());
    }
}
