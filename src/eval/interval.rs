//! Confidence intervals for accuracies.

/// Returns the 95 % confidence interval of a proportion (Wilson 1927).
pub fn wilson(count: usize, of: usize) -> (f64, f64) {
    if of == 0 {
        return (0.0, 1.0);
    }
    let (z, n) = (1.959964, of as f64);
    let share = count as f64 / n;
    let center = share + z * z / (2.0 * n);
    let spread = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (
        ((center - spread) / scale).max(0.0),
        ((center + spread) / scale).min(1.0),
    )
}
