//! Checks that an adversarial image satisfies its attack's threat model, with code that is independent of the attacks.

use crate::attack::unseen::{Corruption, Unseen};
use crate::attack::{Attack, Norm};

/// Tolerance for rounding to f32.
const SLACK: f64 = 1e-6;

/// Returns the distance of an adversarial image from the clean one, in the attack's norm. An unseen attack has none, and
/// [`corrupted`] checks its images instead.
///
/// Errors: a pixel is NaN or outside [0, 1], or the distance exceeds epsilon.
pub fn distance(attack: &Attack, clean: &[f32], found: &[f32]) -> Result<f64, String> {
    let name = attack.name();
    let (Some(norm), Some(epsilon)) = (attack.norm(), attack.epsilon()) else {
        return Err(format!("{name} is not bounded by a norm"));
    };
    check_range(&name, found)?;
    let (mut largest, mut sum, mut squares) = (0.0f64, 0.0, 0.0);
    for (clean, pixel) in clean.iter().zip(found) {
        let change = (f64::from(*pixel) - f64::from(*clean)).abs();
        largest = largest.max(change);
        sum += change;
        squares += change * change;
    }
    let distance = match norm {
        Norm::Linf => largest,
        Norm::L2 => squares.sqrt(),
        Norm::L1 => sum,
    };
    match distance <= epsilon.value() + SLACK {
        true => Ok(distance),
        false => Err(format!(
            "{name} left the epsilon ball: distance {distance} exceeds {epsilon}"
        )),
    }
}

/// Returns the norm of the parameters of an unseen attack. `again` is the corruption rendered once more with them.
///
/// Errors: a pixel is NaN or outside [0, 1], the parameters left their set, or they do not render this image.
pub fn corrupted(
    attack: &Unseen,
    parameters: &[f32],
    again: Option<&[f32]>,
    found: &[f32],
) -> Result<f64, String> {
    let name = attack.name();
    check_range(name, found)?;
    let sizes = parameters.iter().map(|value| f64::from(*value).abs());
    let length = match attack.parameter_norm {
        // Unlike `max`, keeps NaN.
        Norm::Linf => sizes.fold(0.0, |most, size| if size <= most { most } else { size }),
        Norm::L2 => sizes.map(|size| size * size).sum::<f64>().sqrt(),
        Norm::L1 => sizes.sum(),
    };
    let epsilon = &attack.parameter_epsilon;
    // The largest epsilons are far above 1, so rounding is relative.
    let is_inside = length <= epsilon.value() * (1.0 + SLACK) + SLACK;
    let shares = match attack.corruption {
        Corruption::Pixel => 0.0..=1.0,
        _ => f32::MIN..=f32::MAX,
    };
    if !is_inside || !parameters.iter().all(|value| shares.contains(value)) {
        return Err(format!(
            "{name} left its parameter set: norm {length} with epsilon {epsilon}"
        ));
    }
    match again == Some(found) {
        true => Ok(length),
        false => Err(format!(
            "{name} returned an image that its parameters do not render"
        )),
    }
}

fn check_range(name: &str, found: &[f32]) -> Result<(), String> {
    match found.iter().find(|pixel| !(0.0..=1.0).contains(*pixel)) {
        None => Ok(()),
        Some(pixel) => Err(format!(
            "{name} produced a pixel value of {pixel}, outside [0, 1]"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::square::Square;
    use crate::attack::unseen::Strength;

    #[test]
    fn parameters_outside_their_set_or_of_another_image_are_rejected() {
        let image = [0.5, 0.25];
        let judge = |corruption, parameters: &[f32], again: &[f32]| {
            let attack = Unseen::new(corruption, Strength::Medium, 224);
            corrupted(&attack, parameters, Some(again), &image)
        };
        let glitch = |parameters: &[f32]| judge(Corruption::Glitch, parameters, &image);
        assert!((glitch(&[0.05, -0.02]).unwrap() - 0.05).abs() < 1e-6);
        for bad in [0.051, -0.06, f32::NAN] {
            let error = glitch(&[bad, 0.01]).unwrap_err();
            assert!(error.contains("left its parameter set"), "{error}");
        }
        assert_eq!(
            judge(Corruption::Pixel, &[0.6, 0.8], &image).unwrap() as f32,
            1.0
        );
        // Within the ball of radius 5, but no shares.
        for bad in [[-0.1, 0.5], [1.5, 0.0]] {
            assert!(judge(Corruption::Pixel, &bad, &image).is_err());
        }
        let error = judge(Corruption::Glitch, &[0.0, 0.0], &[0.5, 0.2501]).unwrap_err();
        assert!(error.contains("do not render"), "{error}");
    }

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
