//! The control socket: reads requests, answers them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tracing::debug;

use super::Supervisor;
use crate::control::{LINE_LEN_MAX, Request, Response};

/// Listens now, answers until the process ends.
pub fn start(supervisor: Arc<Supervisor>) -> anyhow::Result<()> {
    let socket = supervisor.plan.control_socket();
    // A socket of an earlier supervisor of this sandbox would be in the way.
    let _ = std::fs::remove_file(&socket);
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, Arc::clone(&supervisor)))),
                Err(error) => {
                    debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(stream: UnixStream, supervisor: Arc<Supervisor>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        match (&mut reader).take(LINE_LEN_MAX as u64).read_line(&mut line).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        let response = match serde_json::from_str::<Request>(&line) {
            Ok(request) => supervisor.answer(request).await,
            Err(error) => Response::Refused {
                message: format!("this is not a request: {error}"),
            },
        };
        let Ok(mut text) = serde_json::to_vec(&response) else {
            return;
        };
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return;
        }
    }
}
