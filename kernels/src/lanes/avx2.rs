//! placeholder
use super::portable::Portable;
pub(crate) type Avx2 = Portable;
