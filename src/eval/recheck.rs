//! Checks that an adversarial image satisfies its attack's threat model, with code that is independent of the attacks.

use crate::attack::{Attack, Norm};

/// Tolerance for rounding to f32.
const SLACK: f64 = 1e-6;

/// Returns the distance of an adversarial image from the clean one, in the attack's norm.
///
/// Errors: a pixel is NaN or outside [0, 1], or the distance exceeds epsilon.
pub fn distance(attack: &Attack, clean: &[f32], found: &[f32]) -> Result<f64, String> {
    let name = attack.name();
    let (mut largest, mut sum, mut squares) = (0.0f64, 0.0, 0.0);
    for (clean, pixel) in clean.iter().zip(found) {
        if !(0.0..=1.0).contains(pixel) {
            return Err(format!(
                "{name} produced a pixel value of {pixel}, outside [0, 1]"
            ));
        }
        let change = (f64::from(*pixel) - f64::from(*clean)).abs();
        largest = largest.max(change);
        sum += change;
        squares += change * change;
    }
    let distance = match attack.norm() {
        Norm::Linf => largest,
        Norm::L2 => squares.sqrt(),
        Norm::L1 => sum,
    };
    let epsilon = attack.epsilon();
    match distance <= epsilon.value() + SLACK {
        true => Ok(distance),
        false => Err(format!(
            "{name} left the epsilon ball: distance {distance} exceeds {epsilon}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::square::Square;

    #[test]
    fn images_outside_the_ball_or_the_pixel_range_are_rejected() {
        let attack = |norm| {
            Attack::Square(Square {
                norm,
                epsilon: "0.1".parse().unwrap(),
                queries: 1,
            })
        };
        let clean = [0.5, 0.5];
        let judge = |norm, found: [f32; 2]| distance(&attack(norm), &clean, &found);
        assert!((judge(Norm::Linf, [0.55, 0.6]).unwrap() - 0.1).abs() < 1e-6);
        assert!(judge(Norm::L2, [0.57, 0.57]).unwrap() < 0.1);
        assert!(
            judge(Norm::L2, [0.58, 0.58])
                .unwrap_err()
                .contains("left the epsilon ball")
        );
        assert!(
            judge(Norm::L1, [0.56, 0.56])
                .unwrap_err()
                .contains("exceeds 0.1")
        );
        assert!(
            judge(Norm::Linf, [f32::NAN, 0.5])
                .unwrap_err()
                .contains("a pixel value of NaN")
        );
        let attack = Attack::Square(Square {
            norm: Norm::Linf,
            epsilon: "1".parse().unwrap(),
            queries: 1,
        });
        assert!(
            distance(&attack, &clean, &[1.2, 0.5])
                .unwrap_err()
                .contains("outside [0, 1]")
        );
    }
}
