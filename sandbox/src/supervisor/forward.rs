//! Carries TCP connections from one network namespace into another.

use std::time::Duration;

use tokio::io::copy_bidirectional;
use tracing::debug;

use crate::netns;
use crate::plan::Forward;

/// How long a connection to the target may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens now and carries connections until the process ends.
pub async fn start(forward: Forward) -> std::io::Result<()> {
    let listener = netns::listen(forward.listen_netns.as_deref().map(netns::path), forward.listen).await?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(carry(client, forward.clone()))),
                // Out of file descriptors, most likely: give others time to close some.
                Err(error) => {
                    debug!(%error, listen = %forward.listen, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn carry(mut client: tokio::net::TcpStream, forward: Forward) {
    let target_netns = forward.target_netns.as_deref().map(netns::path);
    // Whoever connects sees a closed connection when the target does not answer, as a process that is down would do.
    let Ok(mut target) = netns::connect(target_netns, forward.target, CONNECT_TIMEOUT).await else {
        return;
    };
    // Latency of watch events matters more than packets here.
    let _ = (client.set_nodelay(true), target.set_nodelay(true));
    let _ = copy_bidirectional(&mut client, &mut target).await;
}
