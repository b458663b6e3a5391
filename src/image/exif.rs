//! Tags of TIFF files and of EXIF data, which share one format.
//!
//! Source: TIFF 6.0, section 2; EXIF 2.3.

/// The first tag directory of a file.
pub(crate) struct Tags<'a> {
    bytes: &'a [u8],
    little: bool,
    /// Offset of its first entry, and the number of entries.
    start: usize,
    count: usize,
}

/// The tag that says how the image is rotated or mirrored.
const ORIENTATION: u16 = 0x0112;

impl<'a> Tags<'a> {
    /// Finds the tags of a TIFF file, or of EXIF data with or without its `Exif` prefix. Returns `None` for BigTIFF.
    pub(crate) fn of(bytes: &'a [u8]) -> Option<Self> {
        let bytes = bytes.strip_prefix(b"Exif\0\0").unwrap_or(bytes);
        let little = match bytes.get(..4)? {
            // BigTIFF, which has 64-bit offsets.
            [b'I', b'I', 43, 0] | [b'M', b'M', 0, 43] => return None,
            [b'I', b'I', ..] => true,
            [b'M', b'M', ..] => false,
            _ => return None,
        };
        let mut tags = Self {
            bytes,
            little,
            start: 0,
            count: 0,
        };
        let directory = tags.long(4)?;
        tags.count = usize::from(tags.short(directory)?);
        tags.start = directory.checked_add(2)?;
        Some(tags)
    }

    fn short(&self, at: usize) -> Option<u16> {
        let pair: [u8; 2] = self.bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(match self.little {
            true => u16::from_le_bytes(pair),
            false => u16::from_be_bytes(pair),
        })
    }

    fn long(&self, at: usize) -> Option<usize> {
        let (one, two) = (self.short(at)?, self.short(at.checked_add(2)?)?);
        let (one, two) = (usize::from(one), usize::from(two));
        Some(match self.little {
            true => one | two << 16,
            false => one << 16 | two,
        })
    }

    /// Returns the offset of a tag's value field. The field holds the value, or the offset of values that do not fit.
    pub(crate) fn place(&self, tag: u16) -> Option<usize> {
        let entries = (0..self.count).map(|entry| self.start + 12 * entry);
        let mut entries = entries.take_while(|at| *at < self.bytes.len());
        Some(entries.find(|at| self.short(*at) == Some(tag))? + 8)
    }

    /// Returns the value of a tag that holds one 16-bit number.
    pub(crate) fn value(&self, tag: u16) -> Option<u16> {
        self.short(self.place(tag)?)
    }

    /// Returns `count` 16-bit values of a tag.
    pub(crate) fn values(&self, tag: u16, count: usize) -> Option<Vec<u16>> {
        let at = self.long(self.place(tag)?)?;
        (0..count)
            .map(|number| self.short(at.checked_add(2 * number)?))
            .collect()
    }

    /// Returns the orientation, 1 to 8, if it is present and valid.
    pub(crate) fn orientation(&self) -> Option<u16> {
        self.value(ORIENTATION)
            .filter(|value| (1..=8).contains(value))
    }

    /// Returns whether another directory follows: a second image or a thumbnail.
    pub(crate) fn are_followed(&self) -> bool {
        let next = self.long(self.start + 12 * self.count);
        next.is_some_and(|next| next != 0)
    }

    /// Returns a copy of the file with `tag`, which holds one 16-bit number, set to `value`.
    pub(crate) fn with(&self, tag: u16, value: u16) -> Option<Vec<u8>> {
        let at = self.place(tag)?;
        let mut bytes = self.bytes.to_vec();
        let two = match self.little {
            true => value.to_le_bytes(),
            false => value.to_be_bytes(),
        };
        bytes.get_mut(at..at + 2)?.copy_from_slice(&two);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orientation(exif: &[u8]) -> Option<u16> {
        Tags::of(exif)?.orientation()
    }

    #[test]
    fn damaged_exif_data_gives_no_orientation() {
        assert_eq!(orientation(b""), None);
        assert_eq!(orientation(b"II*\0\xff\xff\xff\xff"), None);
        let sound = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0";
        assert_eq!(orientation(sound), Some(6));
        assert_eq!(orientation(&sound[..18]), None);
    }

    #[test]
    fn a_value_is_replaced_in_either_byte_order() {
        let sound = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0";
        let other = Tags::of(sound).unwrap().with(ORIENTATION, 3).unwrap();
        assert_eq!((orientation(&other), other.len()), (Some(3), sound.len()));
        assert_eq!(Tags::of(sound).unwrap().with(7, 3), None);
    }
}
