//! Whether an adversarial image is what its attack promised, judged by code that shares nothing with the attacks.

use crate::attack::{Attack, Norm};

/// Roundings to f32 may put an image this far outside its ball.
const SLACK: f64 = 1e-6;

/// How far an adversarial image is from the clean one, in the attack's norm.
///
/// Errors: a pixel that is not a number or outside [0, 1], or a distance above epsilon.
pub fn distance(attack: &Attack, clean: &[f32], found: &[f32]) -> Result<f64, String> {
    let name = attack.name();
    let (mut largest, mut sum, mut squares) = (0.0f64, 0.0, 0.0);
    for (clean, pixel) in clean.iter().zip(found) {
        if !(0.0..=1.0).contains(pixel) {
            return Err(format!("{name} made a pixel of {pixel}, outside [0, 1]"));
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
            "{name} left its ball: {distance} is more than {epsilon}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::square::Square;

    #[test]
    fn what_is_not_an_image_in_the_ball_is_refused() {
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
                .contains("left its ball")
        );
        assert!(
            judge(Norm::L1, [0.56, 0.56])
                .unwrap_err()
                .contains("is more than 0.1")
        );
        assert!(
            judge(Norm::Linf, [f32::NAN, 0.5])
                .unwrap_err()
                .contains("a pixel of NaN")
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
