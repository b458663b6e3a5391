//! Weights of a block, packed once per update for all the passes until the next.

use crate::block::BlockShape;
use crate::detect::Isa;
use crate::linear::{Linear, Norm, Spread, pack_linear};
use crate::mlp::Mlp;
use crate::weights::BlockWeights;
use crate::{Path, Precision};

/// The weights of a block, packed and rounded for all products of both directions.
///
/// Make it once per update; every pass until the next update shares it. It keeps the [`Path`] of
/// the thread that made it.
#[derive(Debug)]
pub struct PackedBlock {
    pub(super) isa: Isa,
    pub(super) precision: Precision,
    width: usize,
    heads: usize,
    hidden: usize,
    pub(super) norm1: Norm,
    pub(super) qkv: Linear,
    pub(super) proj: Linear,
    pub(super) mlp: Mlp,
}

impl PackedBlock {
    /// Packs the weights of a block of `heads` heads; the other sizes follow from the slices.
    ///
    /// # Panics
    ///
    /// If the lengths of the slices do not match, or `heads` does not divide the width.
    pub fn new(heads: usize, weights: &BlockWeights<&[f32]>, precision: Precision) -> Self {
        let width = weights.norm1_weight.len();
        let hidden = weights.fc1_bias.len();
        assert!(heads > 0 && width > 0 && width.is_multiple_of(heads), "heads = {heads} must divide width = {width}");
        for (name, found, right) in [
            ("norm1_bias", weights.norm1_bias.len(), width),
            ("qkv_weight", weights.qkv_weight.len(), 3 * width * width),
            ("qkv_bias", weights.qkv_bias.len(), 3 * width),
            ("proj_weight", weights.proj_weight.len(), width * width),
            ("proj_bias", weights.proj_bias.len(), width),
            ("norm2_weight", weights.norm2_weight.len(), width),
            ("norm2_bias", weights.norm2_bias.len(), width),
            ("fc1_weight", weights.fc1_weight.len(), hidden * width),
            ("fc2_weight", weights.fc2_weight.len(), width * hidden),
            ("fc2_bias", weights.fc2_bias.len(), width),
        ] {
            assert!(found == right, "`{name}` has {found} elements, width {width} and hidden {hidden} need {right}");
        }
        let isa = Isa::current();
        let whole = Spread::whole(width);
        let inner = Spread { groups: heads, size: width / heads };
        let three = Spread { groups: 3 * heads, ..inner };
        let inside = Spread::whole(hidden);
        let norm1 = Norm::new(weights.norm1_weight, weights.norm1_bias);
        let norm2 = Norm::new(weights.norm2_weight, weights.norm2_bias);
        let pack = |weight, bias, rows, columns, norm| pack_linear(isa, precision, weight, bias, rows, columns, norm);
        let ((qkv, proj), (fc1, fc2)) = rayon::join(
            || {
                rayon::join(
                    || pack(weights.qkv_weight, weights.qkv_bias, three, whole, Some(&norm1)),
                    || pack(weights.proj_weight, weights.proj_bias, whole, inner, None),
                )
            },
            || {
                rayon::join(
                    || pack(weights.fc1_weight, weights.fc1_bias, inside, whole, Some(&norm2)),
                    || pack(weights.fc2_weight, weights.fc2_bias, whole, inside, None),
                )
            },
        );
        Self { isa, precision, width, heads, hidden, norm1, qkv, proj, mlp: Mlp { norm: norm2, fc1, fc2 } }
    }

    /// The format of the products' operands.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The instructions its kernels run on.
    pub fn path(&self) -> Path {
        self.isa.path()
    }

    pub(super) fn check(&self, shape: &BlockShape) {
        let found = (shape.width, shape.heads, shape.hidden);
        let packed = (self.width, self.heads, self.hidden);
        assert!(found == packed, "shape has (width, heads, hidden) = {found:?}, the packed weights {packed:?}");
    }
}
