//! Serves an empty API for a look with kubectl: `cargo run --example serve -- 127.0.0.1:8001`.

use isthmus_sandbox_kube::{KubeApi, Options, kubeconfig_yaml};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    let url = format!("http://{}", listener.local_addr()?);
    println!("{}", kubeconfig_yaml("example", &url));
    KubeApi::new(Options::default())
        .serve(listener, CancellationToken::new())
        .await
}
