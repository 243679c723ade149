//! The floor of a cold start: a bare client that lists all sources at once, in pages, and keeps nothing.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use isthmus_proto::etcdserverpb::{RangeRequest, RangeResponse};
use isthmus_wire::keys::{self, HEARTBEAT, SYNCED, Scope, range_end};
use tokio::task::JoinSet;
use tokio_rustls::rustls::ClientConfig;

use super::{mock::Mock, population::KINDS};
use crate::reader::Connection;

/// Keys in a page, as Cilium's readers and ours ask for.
const PAGE: i64 = 256;

/// Seconds until everything was read once.
pub async fn list_all(mocks: &[Mock], config: &Arc<ClientConfig>) -> Result<f64> {
    let begun = Instant::now();
    let mut lists = JoinSet::new();
    for mock in mocks {
        let config_key = keys::cluster_config(&mock.name);
        let mut prefixes = vec![HEARTBEAT.to_owned(), format!("{SYNCED}{}/", mock.name)];
        for kind in KINDS {
            prefixes.push(kind.prefix(Scope::State, &mock.name).context("no prefix")?);
        }
        let (address, config, want) = (mock.address, config.clone(), mock.keys);
        lists.spawn(async move {
            let mut connection = Connection::open(config, address).await?;
            let mut got = list(&mut connection, config_key.into_bytes(), vec![]).await?;
            for prefix in prefixes {
                let end = range_end(prefix.as_bytes());
                got += list(&mut connection, prefix.into_bytes(), end).await?;
            }
            ensure!(got == want, "{got} keys, not {want}");
            Ok(())
        });
    }
    while let Some(listed) = lists.join_next().await {
        listed??;
    }
    Ok(begun.elapsed().as_secs_f64())
}

async fn list(connection: &mut Connection, mut from: Vec<u8>, end: Vec<u8>) -> Result<usize> {
    let (mut revision, mut got) = (0, 0);
    loop {
        let request = RangeRequest {
            key: from.into(),
            range_end: end.clone().into(),
            limit: PAGE,
            revision,
            ..Default::default()
        };
        let mut responses = connection.call("/etcdserverpb.KV/Range", &request, true).await?;
        let page: RangeResponse = responses.next().await?;
        revision = page.header.context("no header")?.revision;
        got += page.kvs.len();
        let last = page.kvs.last().filter(|_| page.more);
        let Some(last) = last else { return Ok(got) };
        from = last.key.to_vec();
        from.push(0);
    }
}
