use crate::data::{Augmentation, Mixing};
use crate::settings::Table;
impl Augmentation { pub fn read(table: &Table) -> Option<Self> {
    let pad: Option<u64> = table.optional("pad_crop");
    Some(Self { random_resized_crop: None, pad_crop: pad.map(|p| p as u32), flip: table.required("flip")?, rand_augment: None }) } }
impl Mixing { pub fn read(_: &Table) -> Option<Self> { None } }
