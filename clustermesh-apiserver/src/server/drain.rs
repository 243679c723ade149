//! The end of a server: nobody is let in, everybody is sent away, a few at a time, so that the other replicas are not run over.

use std::{sync::Arc, time::Duration};

use rand::seq::SliceRandom;
use tokio_util::task::TaskTracker;

use super::Context;

/// Time between two rounds.
const ROUND: Duration = Duration::from_millis(50);
/// Who was cut off is gone after so long.
const CUT_MAX: Duration = Duration::from_secs(1);

/// How many of `peers` leave in each round, so that all have left after `spread`. Pure.
fn rounds(peers: usize, spread: Duration) -> Vec<usize> {
    let count = usize::try_from(spread.as_millis() / ROUND.as_millis())
        .unwrap_or(1)
        .max(1);
    let gone = |round: usize| peers * round / count;
    (0..count)
        .map(|round| gone(round + 1) - gone(round))
        .filter(|leave| *leave > 0)
        .collect()
}

/// Sends everybody away and waits until they have gone. Each stream ends after what was still to be said in it.
pub(super) async fn drain(context: &Arc<Context>, connections: TaskTracker) {
    let limits = &context.limits;
    connections.close();
    let mut peers = context.registry.begin_to_leave();
    // Their order is nobody's: each replica's clients come to another one at another time.
    peers.shuffle(&mut rand::rng());
    let count = peers.len();
    let rounds = rounds(count, limits.shutdown_spread);
    let pause = limits.shutdown_spread / u32::try_from(rounds.len().max(1)).unwrap_or(1);
    let mut peers = peers.into_iter();
    for leave in rounds {
        peers.by_ref().take(leave).for_each(|peer| peer.leave());
        // So that no stream needs a wake-up of its own for it.
        context.shared.wake_all();
        tokio::time::sleep(pause).await;
    }
    if tokio::time::timeout(limits.shutdown_timeout, connections.wait())
        .await
        .is_ok()
    {
        tracing::info!(clients = count, "all clients have gone");
        return;
    }
    let stayed = context.registry.begin_to_leave();
    tracing::warn!(
        clients = stayed.len(),
        after = ?limits.shutdown_timeout,
        "clients that did not go are cut off; see --shutdown-timeout"
    );
    stayed
        .iter()
        .for_each(|peer| context.cut_off(peer, "shutdown_timeout"));
    let _ = tokio::time::timeout(CUT_MAX, connections.wait()).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everybody_leaves_once_and_evenly(peers in 0usize..20_000, spread_ms in 0u64..5_000) {
            let spread = Duration::from_millis(spread_ms);
            let rounds = rounds(peers, spread);
            prop_assert_eq!(rounds.iter().sum::<usize>(), peers);
            prop_assert!(rounds.len() as u64 <= (spread_ms / 50).max(1));
            if let (Some(most), Some(least)) = (rounds.iter().max(), rounds.iter().min()) {
                prop_assert!(most - least <= 1);
            }
        }
    }
}
