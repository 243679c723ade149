//! Calls at random that write and read, the same for every server that is to be compared.

use std::fmt::Debug;

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, DeleteOptions, Error, GetOptions, LeaseGrantOptions,
    PutOptions, SortOrder, SortTarget, Txn, TxnOp,
};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

/// Where it writes.
pub const PREFIX: &str = "cilium/state/x/";

/// The answer as text, without what differs between any two servers: IDs and terms.
pub fn told(result: Result<impl Debug, Error>) -> String {
    let mut text = match result {
        Ok(answer) => format!("{answer:?}"),
        Err(Error::GRpcStatus(status)) => format!("{:?}: {}", status.code(), status.message()),
        Err(other) => panic!("{other}"),
    };
    for field in ["cluster_id: ", "member_id: ", "raft_term: "] {
        let mut parts = text.split(field).map(str::to_owned);
        let first = parts.next().unwrap();
        text = parts.fold(first, |text, part| {
            text + field + part.trim_start_matches(|c: char| c.is_ascii_digit())
        });
    }
    text
}

/// Calls at random, the same for every server.
pub struct Script {
    pub random: StdRng,
    /// Of the servers now.
    pub revision: i64,
}

/// One call.
#[derive(Clone, Debug)]
pub enum Step {
    Put(String, String, PutOptions),
    Delete(String, DeleteOptions),
    Get(String, GetOptions),
    Txn(Txn),
    Compact(i64),
    Grant(i64),
    Revoke(i64),
}

impl Script {
    fn key(&mut self) -> String {
        let key = ["a", "b", "b/1", "b/2", "b/3", "c", ""].choose(&mut self.random);
        format!("{PREFIX}{}", key.unwrap())
    }

    fn value(&mut self) -> String {
        "v".repeat(self.random.random_range(0..4))
    }

    fn lease(&mut self) -> i64 {
        if self.random.random_bool(0.7) {
            0
        } else {
            self.random.random_range(1..4)
        }
    }

    fn put_options(&mut self) -> PutOptions {
        let mut options = PutOptions::new().with_lease(self.lease());
        if self.random.random() {
            options = options.with_prev_key();
        }
        if self.random.random_bool(0.1) {
            options = options.with_ignore_value();
        }
        if self.random.random_bool(0.1) {
            options = options.with_ignore_lease();
        }
        options
    }

    fn delete_options(&mut self) -> DeleteOptions {
        let options = match self.random.random_range(0..5) {
            0 => DeleteOptions::new().with_range(format!("{PREFIX}b/3")),
            1 => DeleteOptions::new().with_range("a"),
            2 => DeleteOptions::new().with_prefix(),
            _ => DeleteOptions::new(),
        };
        if self.random.random() {
            options.with_prev_key()
        } else {
            options
        }
    }

    fn get_options(&mut self, in_txn: bool) -> GetOptions {
        let mut options = match self.random.random_range(0..4) {
            0 => GetOptions::new(),
            1 => GetOptions::new().with_range(format!("{PREFIX}b/3")),
            _ => GetOptions::new().with_prefix(),
        };
        if self.random.random_bool(0.3) {
            options = options.with_limit(self.random.random_range(0..4));
        }
        if self.random.random_bool(0.3) {
            let target = [
                SortTarget::Key,
                SortTarget::Version,
                SortTarget::Create,
                SortTarget::Mod,
                SortTarget::Value,
            ];
            let order = [SortOrder::None, SortOrder::Ascend, SortOrder::Descend];
            options = options.with_sort(
                *target.choose(&mut self.random).unwrap(),
                *order.choose(&mut self.random).unwrap(),
            );
        }
        match self.random.random_range(0..9) {
            0 => options.with_keys_only(),
            1 => options.with_count_only(),
            2 => options.with_min_mod_revision(self.revision - 4),
            3 => options.with_max_create_revision(self.revision - 4),
            4 => options.with_revision(self.revision + 7),
            // Outside a transaction the header of ours then says that revision, on purpose.
            5 if in_txn => options.with_revision(self.revision - self.random.random_range(0..8)),
            _ => options,
        }
    }

    fn compare(&mut self) -> Compare {
        let operators = [
            CompareOp::Equal,
            CompareOp::Greater,
            CompareOp::Less,
            CompareOp::NotEqual,
        ];
        let operator = *operators.choose(&mut self.random).unwrap();
        let (key, some) = (self.key(), self.random.random_range(-3..3));
        let compare = match self.random.random_range(0..5) {
            0 => Compare::version(key, operator, some),
            1 => Compare::create_revision(key, operator, self.revision + 3 * some),
            2 => Compare::mod_revision(key, operator, self.revision + some),
            3 => Compare::value(key, operator, self.value()),
            _ => Compare::lease(key, operator, self.lease()),
        };
        if self.random.random_bool(0.3) {
            compare.with_prefix()
        } else {
            compare
        }
    }

    fn ops(&mut self, depth: u32) -> Vec<TxnOp> {
        let count = self.random.random_range(0..4);
        let op = |script: &mut Self| match script.random.random_range(0..8) {
            0..4 => TxnOp::put(script.key(), script.value(), Some(script.put_options())),
            4 => TxnOp::delete(script.key(), Some(script.delete_options())),
            5 if depth > 0 => TxnOp::txn(script.txn(depth - 1)),
            _ => TxnOp::get(script.key(), Some(script.get_options(true))),
        };
        (0..count).map(|_| op(self)).collect()
    }

    fn txn(&mut self, depth: u32) -> Txn {
        let compares = self.random.random_range(0..3);
        let compares: Vec<Compare> = (0..compares).map(|_| self.compare()).collect();
        Txn::new()
            .when(compares)
            .and_then(self.ops(depth))
            .or_else(self.ops(depth))
    }

    pub fn step(&mut self) -> Step {
        match self.random.random_range(0..40) {
            0..10 => Step::Put(self.key(), self.value(), self.put_options()),
            10..15 => Step::Delete(self.key(), self.delete_options()),
            15..20 => Step::Get(self.key(), self.get_options(false)),
            20..35 => Step::Txn(self.txn(2)),
            35 => Step::Compact(self.revision - self.random.random_range(-2..12)),
            36..38 => Step::Grant(self.random.random_range(1..4)),
            _ => Step::Revoke(self.random.random_range(1..4)),
        }
    }
}

impl Step {
    pub async fn run(self, client: &mut Client) -> String {
        match self {
            Self::Put(key, value, options) => told(client.put(key, value, Some(options)).await),
            Self::Delete(key, options) => told(client.delete(key, Some(options)).await),
            Self::Get(key, options) => told(client.get(key, Some(options)).await),
            Self::Txn(txn) => told(client.txn(txn).await),
            Self::Compact(at) => told(client.compact(at, Some(CompactionOptions::new())).await),
            Self::Grant(id) => told(
                client
                    .lease_grant(600, Some(LeaseGrantOptions::new().with_id(id)))
                    .await,
            ),
            Self::Revoke(id) => told(client.lease_revoke(id).await),
        }
    }
}
