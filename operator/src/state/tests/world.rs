//! Small Kubernetes objects, and a state with what it published so far.

use super::*;

pub const RETENTION: Retention = Retention {
    grace: Duration::from_secs(100),
    rest: Duration::from_secs(500),
};

pub fn settings() -> Settings {
    let max_clusters = MaxConnectedClusters::C255;
    Settings {
        cluster: Cluster {
            name: ClusterName::new("c1").unwrap(),
            id: ClusterId::new(1, max_clusters).unwrap(),
        },
        max_clusters,
        filter: LabelFilter::new("").unwrap(),
        cilium_services: true,
        retention: RETENTION,
    }
}

/// A state and the keys it wrote.
pub struct Run {
    pub state: State,
    pub published: BTreeMap<Bytes, Bytes>,
    pub now: Duration,
}

impl Run {
    pub fn new() -> Self {
        Self::with(settings())
    }

    pub fn with(settings: Settings) -> Self {
        let mut state = State::new(settings);
        state.activate([], 0, Duration::ZERO);
        Self {
            state,
            published: BTreeMap::new(),
            now: Duration::ZERO,
        }
    }

    pub fn put(&mut self, object: Object) -> Vec<Change> {
        self.state.on(object.put());
        self.settle()
    }

    pub fn delete(&mut self, object: Object) -> Vec<Change> {
        self.state.on(object.delete());
        self.settle()
    }

    pub fn settle(&mut self) -> Vec<Change> {
        let changes = self.state.desired(self.now);
        apply(&mut self.published, &changes);
        changes
    }

    pub fn keys(&self) -> Vec<String> {
        self.published
            .keys()
            .map(|key| String::from_utf8_lossy(key).into_owned())
            .collect()
    }
}

/// Each change must change something.
pub fn apply(published: &mut BTreeMap<Bytes, Bytes>, changes: &[Change]) {
    for Change { key, value } in changes {
        let old = match value {
            Some(value) => published.insert(key.clone(), value.clone()),
            None => published.remove(key),
        };
        assert_ne!(&old, value, "{key:?} was so before");
    }
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a test's objects are few")]
pub enum Object {
    Service(Service),
    Slice(EndpointSlice),
    Pod(Pod),
    Node(KubeNode),
    Namespace(Namespace),
}

impl Object {
    pub fn key(&self) -> (Kind, ObjectKey) {
        match self {
            Self::Service(object) => (Kind::Services, ObjectKey::of(&object.metadata)),
            Self::Slice(object) => (Kind::EndpointSlices, ObjectKey::of(&object.metadata)),
            Self::Pod(object) => (Kind::Pods, ObjectKey::of(&object.metadata)),
            Self::Node(object) => (Kind::Nodes, ObjectKey::of(&object.metadata)),
            Self::Namespace(object) => (Kind::Namespaces, ObjectKey::of(&object.metadata)),
        }
    }

    fn input(self, listed: bool) -> Input {
        fn event<O>(object: O, listed: bool) -> Event<O> {
            if listed {
                Event::InitApply(object)
            } else {
                Event::Apply(object)
            }
        }
        match self {
            Self::Service(object) => Input::Service(event(object, listed)),
            Self::Slice(object) => Input::Slice(event(object, listed)),
            Self::Pod(object) => Input::Pod(event(object, listed)),
            Self::Node(object) => Input::Node(event(object, listed)),
            Self::Namespace(object) => Input::Namespace(event(object, listed)),
        }
    }

    pub fn put(self) -> Input {
        self.input(false)
    }

    pub fn delete(self) -> Input {
        match self {
            Self::Service(object) => Input::Service(Event::Delete(object)),
            Self::Slice(object) => Input::Slice(Event::Delete(object)),
            Self::Pod(object) => Input::Pod(Event::Delete(object)),
            Self::Node(object) => Input::Node(Event::Delete(object)),
            Self::Namespace(object) => Input::Namespace(Event::Delete(object)),
        }
    }
}

/// A complete list of one kind.
pub fn relist<'o>(kind: Kind, objects: impl Iterator<Item = &'o Object>) -> Vec<Input> {
    let mark = |done: bool| {
        fn event<O>(done: bool) -> Event<O> {
            if done { Event::InitDone } else { Event::Init }
        }
        match kind {
            Kind::Services => Input::Service(event(done)),
            Kind::EndpointSlices => Input::Slice(event(done)),
            Kind::Pods => Input::Pod(event(done)),
            Kind::Nodes => Input::Node(event(done)),
            Kind::Namespaces => Input::Namespace(event(done)),
        }
    };
    let listed = objects
        .filter(|object| object.key().0 == kind)
        .map(|object| object.clone().input(true));
    std::iter::once(mark(false))
        .chain(listed)
        .chain([mark(true)])
        .collect()
}

fn metadata(namespace: u8, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(format!("n{namespace}")),
        ..Default::default()
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Flavor {
    Plain,
    Global,
    NotShared,
    Headless,
}

pub fn object_service(number: u8, flavor: Flavor) -> Object {
    let mut metadata = metadata(0, format!("s{number}"));
    let mark = |name: [&str; 2], value: &str| (name[0].to_owned(), value.to_owned());
    metadata.annotations = Some(match flavor {
        Flavor::Plain => [].into(),
        Flavor::Global | Flavor::Headless => [mark(annotations::GLOBAL, "true")].into(),
        Flavor::NotShared => [
            mark(annotations::GLOBAL, "true"),
            mark(annotations::SHARED, "false"),
        ]
        .into(),
    });
    let cluster_ip = match flavor {
        Flavor::Headless => "None".to_owned(),
        _ => format!("10.96.0.{number}"),
    };
    Object::Service(Service {
        metadata,
        spec: Some(ServiceSpec {
            cluster_ip: Some(cluster_ip),
            ports: Some(vec![ServicePort {
                port: 80,
                ..Default::default()
            }]),
            ..Default::default()
        }),
        status: None,
    })
}

pub fn object_slice(number: u8, service: u8, endpoints: u8) -> Object {
    let mut metadata = metadata(0, format!("e{number}"));
    metadata.labels = Some([("kubernetes.io/service-name".to_owned(), format!("s{service}"))].into());
    Object::Slice(EndpointSlice {
        metadata,
        address_type: "IPv4".into(),
        ports: Some(vec![EndpointPort {
            port: Some(8080),
            ..Default::default()
        }]),
        endpoints: (0..endpoints)
            .map(|last| Endpoint {
                addresses: vec![format!("10.1.{number}.{last}")],
                ..Default::default()
            })
            .collect(),
    })
}

pub fn object_pod(number: u8, namespace: u8, app: u8, ip: u8) -> Object {
    let mut metadata = metadata(namespace, format!("p{number}"));
    metadata.labels = Some([("app".to_owned(), app.to_string())].into());
    let ip = format!("10.1.0.{ip}");
    Object::Pod(Pod {
        metadata,
        spec: Some(PodSpec::default()),
        status: Some(PodStatus {
            pod_ips: Some(vec![PodIP { ip }]),
            host_ip: Some("172.18.0.3".into()),
            ..Default::default()
        }),
    })
}

pub fn object_namespace(number: u8, variant: u8) -> Object {
    Object::Namespace(Namespace {
        metadata: ObjectMeta {
            name: Some(format!("n{number}")),
            labels: Some([("v".to_owned(), variant.to_string())].into()),
            ..Default::default()
        },
        ..Default::default()
    })
}

pub fn object_node(number: u8, cidr: u8) -> Object {
    Object::Node(KubeNode {
        metadata: ObjectMeta {
            name: Some(format!("w{number}")),
            ..Default::default()
        },
        spec: Some(NodeSpec {
            pod_cidrs: Some(vec![format!("10.1.{cidr}.0/24")]),
            ..Default::default()
        }),
        status: None,
    })
}

#[derive(Clone, Debug)]
pub enum Step {
    Put(Object),
    Delete(Object),
    Relist(Kind, bool),
    Wait(u64),
}

pub fn step() -> impl Strategy<Value = Step> {
    let flavor = prop_oneof![
        Just(Flavor::Plain),
        Just(Flavor::Global),
        Just(Flavor::NotShared),
        Just(Flavor::Headless)
    ];
    let object = prop_oneof![
        (0u8..3, flavor).prop_map(|(number, flavor)| object_service(number, flavor)),
        (0u8..4, 0u8..3, prop_oneof![0u8..5, 98u8..103, Just(250)])
            .prop_map(|(number, service, endpoints)| object_slice(number, service, endpoints)),
        (0u8..5, 0u8..2, 0u8..3, 0u8..4)
            .prop_map(|(number, namespace, app, ip)| object_pod(number, namespace, app, ip)),
        (0u8..2, 0u8..2).prop_map(|(number, variant)| object_namespace(number, variant)),
        (0u8..2, 0u8..2).prop_map(|(number, cidr)| object_node(number, cidr)),
    ];
    let kind = (0usize..5).prop_map(|index| Kind::ALL[index]);
    prop_oneof![
        6 => object.clone().prop_map(Step::Put),
        2 => object.prop_map(Step::Delete),
        1 => (kind, any::<bool>()).prop_map(|(kind, drop)| Step::Relist(kind, drop)),
        1 => (0u64..150).prop_map(Step::Wait),
    ]
}
