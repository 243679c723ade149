//! A measured figure, beside its peer from the same run.

use serde::Serialize;

/// One line of a benchmark's output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The benchmark.
    pub bench: &'static str,
    /// What was measured; the unit is part of the name where it could be mistaken.
    pub metric: &'static str,
    /// Unit of both numbers.
    pub unit: &'static str,
    /// Ours.
    pub ours: f64,
    /// The peer's, from the same run unless `peer_name` says that it is published.
    pub peer: Option<f64>,
    /// What the peer is.
    pub peer_name: Option<&'static str>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
}

impl Figure {
    /// A figure that has no peer.
    pub fn alone(bench: &'static str, metric: &'static str, unit: &'static str, ours: f64) -> Self {
        Self {
            bench,
            metric,
            unit,
            ours: round(ours),
            peer: None,
            peer_name: None,
            ratio: None,
        }
    }

    /// A figure beside its peer.
    pub fn beside(
        bench: &'static str,
        metric: &'static str,
        unit: &'static str,
        ours: f64,
        peer: f64,
        peer_name: &'static str,
    ) -> Self {
        let ratio = (peer != 0.0).then(|| round(ours / peer));
        Self {
            bench,
            metric,
            unit,
            ours: round(ours),
            peer: Some(round(peer)),
            peer_name: Some(peer_name),
            ratio,
        }
    }
}

/// Four significant digits, so that lines stay readable.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_ours_by_the_peers() {
        let figure = Figure::beside("b", "m", "ms", 12.345_678, 24.0, "peer");
        assert_eq!(
            (figure.ours, figure.peer, figure.ratio),
            (12.35, Some(24.0), Some(0.5144))
        );
        assert_eq!(Figure::beside("b", "m", "ms", 1.0, 0.0, "peer").ratio, None);
    }
}
