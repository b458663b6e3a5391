//! The corruptions of ImageNet-UA's core attacks, and their strengths.

use crate::attack::threat::Norm;
use crate::settings::{Words, words};

words! {
    /// Corruption whose parameters an unseen attack chooses, in the order of the paper's tables.
    pub enum Corruption {
        /// Waves at random points.
        Gabor = "gabor",
        /// Flakes of snow.
        Snow = "snow",
        /// Pixelation.
        Pixel = "pixel",
        /// Noise in the frequencies of JPEG.
        Jpeg = "jpeg",
        /// Colored shapes.
        Kaleidoscope = "kaleidoscope",
        /// Displaced horizontal bars.
        Glitch = "glitch",
        /// Wood grain.
        Wood = "wood",
        /// Elastic deformation.
        Elastic = "elastic",
    }
}

words! {
    /// Strength of an unseen attack, which selects the bound on the parameters.
    pub enum Strength {
        /// Low distortion.
        Low = "low",
        /// Medium distortion, the default of the authors' code.
        Medium = "medium",
        /// High distortion.
        High = "high",
    }
}

/// The name of all corruptions together, as in ImageNet-UA.
pub const ALL: &str = "ua";

impl Corruption {
    /// Returns the norm that bounds the parameters.
    pub fn norm(self) -> Norm {
        match self {
            Self::Snow | Self::Pixel | Self::Elastic => Norm::L2,
            _ => Norm::Linf,
        }
    }

    /// Returns the corruptions that a name selects: one, or every one for [`ALL`].
    pub fn named(name: &str) -> Option<Vec<Self>> {
        match name {
            ALL => Some(Self::VALUES.to_vec()),
            name => Some(vec![Self::from_word(name)?]),
        }
    }
}
