//! The weights of the two kinds of blocks under timm's names: parameters, values or gradients.

/// Defines a struct with one field per weight, and the conversions between it and an array.
macro_rules! named_weights {
    ($(#[$attribute:meta])* $name:ident, $count:literal: $($field:ident),+) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        #[allow(missing_docs)] // The names are timm's; the shapes are above.
        pub struct $name<T> {
            $(pub $field: T,)+
        }

        impl<T> $name<T> {
            /// From values in timm's order.
            pub fn from_array([$($field),+]: [T; $count]) -> Self {
                Self { $($field),+ }
            }

            /// The values in timm's order.
            pub fn into_array(self) -> [T; $count] {
                [$(self.$field),+]
            }

            /// References to the values.
            #[allow(clippy::should_implement_trait)] // Like `Option`, which is not an `AsRef` either.
            pub fn as_ref(&self) -> $name<&T> {
                $name { $($field: &self.$field),+ }
            }

            /// What `f` makes of each value, called in timm's order.
            pub fn map<U>(self, f: impl FnMut(T) -> U) -> $name<U> {
                $name::from_array(self.into_array().map(f))
            }

            /// The values in timm's order.
            pub fn iter(&self) -> std::array::IntoIter<&T, $count> {
                [$(&self.$field),+].into_iter()
            }

            /// The values in timm's order, to be changed.
            pub fn iter_mut(&mut self) -> std::array::IntoIter<&mut T, $count> {
                [$(&mut self.$field),+].into_iter()
            }
        }

        impl<T> IntoIterator for $name<T> {
            type Item = T;
            type IntoIter = std::array::IntoIter<T, $count>;

            fn into_iter(self) -> Self::IntoIter {
                self.into_array().into_iter()
            }
        }

        impl<'a, T> IntoIterator for &'a $name<T> {
            type Item = &'a T;
            type IntoIter = std::array::IntoIter<&'a T, $count>;

            fn into_iter(self) -> Self::IntoIter {
                self.iter()
            }
        }

        impl<'a, T> IntoIterator for &'a mut $name<T> {
            type Item = &'a mut T;
            type IntoIter = std::array::IntoIter<&'a mut T, $count>;

            fn into_iter(self) -> Self::IntoIter {
                self.iter_mut()
            }
        }
    };
}

named_weights! {
    /// Weights of an encoder block in torch's layout: `[out, in]`, row-major, names and order as in timm.
    ///
    /// Shapes: norms and `proj_bias`, `fc2_bias` `[width]`; `qkv_weight` `[3 width, width]`, rows in the
    /// order `3, heads, head_dim`; `proj_weight` `[width, width]`; `fc1_weight` `[hidden, width]`;
    /// `fc2_weight` `[width, hidden]`.
    BlockWeights, 12: norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias
}

named_weights! {
    /// Weights of a ConvNeXt block in torch's layout, names and order as in timm.
    ///
    /// Shapes: `gamma`, `conv_dw_bias`, the norm's and `fc2_bias` `[channels]`; `conv_dw_weight` `[channels, 1, k, k]`;
    /// `fc1_weight` `[hidden, channels]`; `fc1_bias` `[hidden]`; `fc2_weight` `[channels, hidden]`.
    ConvNextWeights, 9: gamma, conv_dw_weight, conv_dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
    fc2_bias
}
