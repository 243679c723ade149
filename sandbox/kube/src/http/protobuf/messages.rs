//! Field numbers of the messages that kubectl sends in protobuf.
//!
//! A message is a text of `number:name:type` words. Types: `str`, `bytes`, `int`, `bool`, `IntOrString`, `Quantity`,
//! `ignored`, or another message. After the type: `*` many, `%` a map from text, `?` unset and zero differ, `^` the
//! fields belong to the message around it.

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Text,
    Bytes,
    Integer,
    Flag,
    IntOrString,
    Quantity,
    Ignored,
    /// A message, by its text.
    Message(&'static str),
}

/// How often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Times {
    Once,
    OnceIfSet,
    Many,
    Map,
    Inline,
}

/// A field.
pub struct Field {
    pub name: &'static str,
    pub shape: Shape,
    pub times: Times,
}

#[rustfmt::skip]
const MESSAGES: &[(&str, &str)] = &[
    // Metadata.
    ("ObjectMeta", "1:name:str 2:generateName:str 3:namespace:str 4:selfLink:str 5:uid:str 6:resourceVersion:str \
        7:generation:int 8:creationTimestamp:ignored 9:deletionTimestamp:ignored 10:deletionGracePeriodSeconds:int? \
        11:labels:str% 12:annotations:str% 13:ownerReferences:OwnerReference* 14:finalizers:str* 17:managedFields:ignored"),
    ("OwnerReference", "1:kind:str 3:name:str 4:uid:str 5:apiVersion:str 6:controller:bool? 7:blockOwnerDeletion:bool?"),
    ("LabelSelector", "1:matchLabels:str% 2:matchExpressions:LabelSelectorRequirement*"),
    ("LabelSelectorRequirement", "1:key:str 2:operator:str 3:values:str*"),
    ("DeleteOptions", "1:gracePeriodSeconds:int? 2:preconditions:Preconditions 3:orphanDependents:bool? \
        4:propagationPolicy:str? 5:dryRun:str*"),
    ("Preconditions", "1:uid:str? 2:resourceVersion:str?"),
    // Core.
    ("Namespace", "1:metadata:ObjectMeta 2:spec:NamespaceSpec 3:status:ignored"),
    ("NamespaceSpec", "1:finalizers:str*"),
    ("ConfigMap", "1:metadata:ObjectMeta 2:data:str% 3:binaryData:bytes% 4:immutable:bool?"),
    ("Secret", "1:metadata:ObjectMeta 2:data:bytes% 3:type:str 4:stringData:str% 5:immutable:bool?"),
    ("ServiceAccount", "1:metadata:ObjectMeta 2:secrets:ObjectReference* 3:imagePullSecrets:LocalObjectReference* \
        4:automountServiceAccountToken:bool?"),
    ("ObjectReference", "1:kind:str 2:namespace:str 3:name:str 4:uid:str 5:apiVersion:str 6:resourceVersion:str 7:fieldPath:str"),
    ("LocalObjectReference", "1:name:str"),
    ("Binding", "1:metadata:ObjectMeta 2:target:ObjectReference"),
    ("ResourceQuota", "1:metadata:ObjectMeta 2:spec:ResourceQuotaSpec 3:status:ignored"),
    ("ResourceQuotaSpec", "1:hard:Quantity% 2:scopes:str*"),
    ("Service", "1:metadata:ObjectMeta 2:spec:ServiceSpec 3:status:ignored"),
    ("ServiceSpec", "1:ports:ServicePort* 2:selector:str% 3:clusterIP:str 4:type:str 5:externalIPs:str* \
        7:sessionAffinity:str 8:loadBalancerIP:str 9:loadBalancerSourceRanges:str* 10:externalName:str \
        11:externalTrafficPolicy:str 12:healthCheckNodePort:int 13:publishNotReadyAddresses:bool \
        14:sessionAffinityConfig:SessionAffinityConfig 17:ipFamilyPolicy:str? 18:clusterIPs:str* 19:ipFamilies:str* \
        20:allocateLoadBalancerNodePorts:bool? 21:loadBalancerClass:str? 22:internalTrafficPolicy:str? \
        23:trafficDistribution:str?"),
    ("SessionAffinityConfig", "1:clientIP:ClientIPConfig"),
    ("ClientIPConfig", "1:timeoutSeconds:int?"),
    ("ServicePort", "1:name:str 2:protocol:str 3:port:int 4:targetPort:IntOrString 5:nodePort:int 6:appProtocol:str?"),
    // Pods.
    ("Pod", "1:metadata:ObjectMeta 2:spec:PodSpec 3:status:ignored"),
    ("PodTemplateSpec", "1:metadata:ObjectMeta 2:spec:PodSpec"),
    ("PodSpec", "1:volumes:Volume* 2:containers:Container* 3:restartPolicy:str 4:terminationGracePeriodSeconds:int? \
        5:activeDeadlineSeconds:int? 6:dnsPolicy:str 7:nodeSelector:str% 8:serviceAccountName:str 9:serviceAccount:str \
        10:nodeName:str 11:hostNetwork:bool 12:hostPID:bool 13:hostIPC:bool 15:imagePullSecrets:LocalObjectReference* \
        16:hostname:str 17:subdomain:str 19:schedulerName:str 20:initContainers:Container* \
        21:automountServiceAccountToken:bool? 22:tolerations:Toleration* 24:priorityClassName:str 25:priority:int? \
        29:runtimeClassName:str? 30:enableServiceLinks:bool? 31:preemptionPolicy:str?"),
    ("Toleration", "1:key:str 2:operator:str 3:value:str 4:effect:str 5:tolerationSeconds:int?"),
    ("Volume", "1:name:str 2:volumeSource:VolumeSource^"),
    ("VolumeSource", "1:hostPath:HostPath? 2:emptyDir:EmptyDir? 6:secret:SecretVolume? 19:configMap:ConfigMapVolume?"),
    ("HostPath", "1:path:str 2:type:str?"),
    ("EmptyDir", "1:medium:str 2:sizeLimit:Quantity"),
    ("SecretVolume", "1:secretName:str 2:items:KeyToPath* 3:defaultMode:int? 4:optional:bool?"),
    ("ConfigMapVolume", "1:localObjectReference:LocalObjectReference^ 2:items:KeyToPath* 3:defaultMode:int? 4:optional:bool?"),
    ("KeyToPath", "1:key:str 2:path:str 3:mode:int?"),
    ("Container", "1:name:str 2:image:str 3:command:str* 4:args:str* 5:workingDir:str 6:ports:ContainerPort* \
        7:env:EnvVar* 8:resources:ResourceRequirements 9:volumeMounts:VolumeMount* 13:terminationMessagePath:str \
        14:imagePullPolicy:str 16:stdin:bool 17:stdinOnce:bool 18:tty:bool 19:envFrom:EnvFromSource* \
        20:terminationMessagePolicy:str 24:restartPolicy:str?"),
    ("ContainerPort", "1:name:str 2:hostPort:int 3:containerPort:int 4:protocol:str 5:hostIP:str"),
    ("EnvVar", "1:name:str 2:value:str 3:valueFrom:EnvVarSource"),
    ("EnvVarSource", "1:fieldRef:ObjectFieldSelector 3:configMapKeyRef:KeySelector 4:secretKeyRef:KeySelector"),
    ("ObjectFieldSelector", "1:apiVersion:str 2:fieldPath:str"),
    ("KeySelector", "1:localObjectReference:LocalObjectReference^ 2:key:str 3:optional:bool?"),
    ("EnvFromSource", "1:prefix:str 2:configMapRef:EnvSource 3:secretRef:EnvSource"),
    ("EnvSource", "1:localObjectReference:LocalObjectReference^ 2:optional:bool?"),
    ("ResourceRequirements", "1:limits:Quantity% 2:requests:Quantity%"),
    ("VolumeMount", "1:name:str 2:readOnly:bool 3:mountPath:str 4:subPath:str 5:mountPropagation:str? 6:subPathExpr:str"),
    // Workloads.
    ("Deployment", "1:metadata:ObjectMeta 2:spec:DeploymentSpec 3:status:ignored"),
    ("DeploymentSpec", "1:replicas:int? 2:selector:LabelSelector 3:template:PodTemplateSpec 4:strategy:DeploymentStrategy \
        5:minReadySeconds:int 6:revisionHistoryLimit:int? 7:paused:bool 9:progressDeadlineSeconds:int?"),
    ("DeploymentStrategy", "1:type:str 2:rollingUpdate:RollingUpdateDeployment"),
    ("RollingUpdateDeployment", "1:maxUnavailable:IntOrString? 2:maxSurge:IntOrString?"),
    ("Job", "1:metadata:ObjectMeta 2:spec:JobSpec 3:status:ignored"),
    ("JobSpec", "1:parallelism:int? 2:completions:int? 3:activeDeadlineSeconds:int? 4:selector:LabelSelector \
        5:manualSelector:bool? 6:template:PodTemplateSpec 7:backoffLimit:int? 8:ttlSecondsAfterFinished:int? \
        9:completionMode:str? 10:suspend:bool?"),
    ("CronJob", "1:metadata:ObjectMeta 2:spec:CronJobSpec 3:status:ignored"),
    ("CronJobSpec", "1:schedule:str 2:startingDeadlineSeconds:int? 3:concurrencyPolicy:str 4:suspend:bool? \
        5:jobTemplate:JobTemplateSpec 6:successfulJobsHistoryLimit:int? 7:failedJobsHistoryLimit:int? 8:timeZone:str?"),
    ("JobTemplateSpec", "1:metadata:ObjectMeta 2:spec:JobSpec"),
    // Policy, access, networking.
    ("Eviction", "1:metadata:ObjectMeta 2:deleteOptions:DeleteOptions"),
    ("PodDisruptionBudget", "1:metadata:ObjectMeta 2:spec:PodDisruptionBudgetSpec 3:status:ignored"),
    ("PodDisruptionBudgetSpec", "1:minAvailable:IntOrString? 2:selector:LabelSelector 3:maxUnavailable:IntOrString? \
        4:unhealthyPodEvictionPolicy:str?"),
    ("PriorityClass", "1:metadata:ObjectMeta 2:value:int? 3:globalDefault:bool 4:description:str 5:preemptionPolicy:str?"),
    ("Role", "1:metadata:ObjectMeta 2:rules:PolicyRule*"),
    ("ClusterRole", "1:metadata:ObjectMeta 2:rules:PolicyRule* 3:aggregationRule:AggregationRule"),
    ("AggregationRule", "1:clusterRoleSelectors:LabelSelector*"),
    ("PolicyRule", "1:verbs:str* 2:apiGroups:str* 3:resources:str* 4:resourceNames:str* 5:nonResourceURLs:str*"),
    ("RoleBinding", "1:metadata:ObjectMeta 2:subjects:Subject* 3:roleRef:RoleRef"),
    ("ClusterRoleBinding", "1:metadata:ObjectMeta 2:subjects:Subject* 3:roleRef:RoleRef"),
    ("Subject", "1:kind:str 2:apiGroup:str 3:name:str 4:namespace:str"),
    ("RoleRef", "1:apiGroup:str 2:kind:str 3:name:str"),
    ("Ingress", "1:metadata:ObjectMeta 2:spec:IngressSpec 3:status:ignored"),
    ("IngressSpec", "1:defaultBackend:IngressBackend 2:tls:IngressTLS* 3:rules:IngressRule* 4:ingressClassName:str?"),
    ("IngressTLS", "1:hosts:str* 2:secretName:str"),
    ("IngressRule", "1:host:str 2:ingressRuleValue:IngressRuleValue^"),
    ("IngressRuleValue", "1:http:HTTPIngressRuleValue"),
    ("HTTPIngressRuleValue", "1:paths:HTTPIngressPath*"),
    ("HTTPIngressPath", "1:path:str 2:backend:IngressBackend 3:pathType:str?"),
    ("IngressBackend", "4:service:IngressServiceBackend"),
    ("IngressServiceBackend", "1:name:str 2:port:ServiceBackendPort"),
    ("ServiceBackendPort", "1:name:str 2:number:int"),
];

/// The text of a message.
pub fn find(name: &str) -> Option<&'static str> {
    MESSAGES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, fields)| *fields)
}

/// The field of a message with this number.
pub fn field(fields: &str, number: u64) -> Option<Field> {
    // Only texts of the table above get here; looking them up again gives the static one.
    let fields = MESSAGES
        .iter()
        .map(|(_, known)| *known)
        .find(|known| *known == fields)?;
    fields.split_whitespace().find_map(|word| {
        let (text, rest) = word.split_once(':')?;
        if text.parse() != Ok(number) {
            return None;
        }
        let (name, shape) = rest.split_once(':')?;
        Some(Field {
            name,
            shape: shape_of(shape),
            times: times_of(shape),
        })
    })
}

fn times_of(text: &str) -> Times {
    match text.chars().last() {
        Some('*') => Times::Many,
        Some('%') => Times::Map,
        Some('?') => Times::OnceIfSet,
        Some('^') => Times::Inline,
        _ => Times::Once,
    }
}

fn shape_of(text: &str) -> Shape {
    match text.trim_end_matches(['*', '%', '?', '^']) {
        "str" => Shape::Text,
        "bytes" => Shape::Bytes,
        "int" => Shape::Integer,
        "bool" => Shape::Flag,
        "IntOrString" => Shape::IntOrString,
        "Quantity" => Shape::Quantity,
        "ignored" => Shape::Ignored,
        // An unknown name takes nothing; a test refuses such tables.
        message => Shape::Message(find(message).unwrap_or("")),
    }
}

/// Fails when the table names a message that it does not have, or a field twice.
#[cfg(test)]
pub fn check() {
    for (name, fields) in MESSAGES {
        let mut numbers = std::collections::BTreeSet::new();
        for word in fields.split_whitespace() {
            let parts: Vec<&str> = word.split(':').collect();
            assert_eq!(parts.len(), 3, "{name}: {word}");
            assert!(numbers.insert(parts[0]), "{name}: {word} twice");
            assert_ne!(shape_of(parts[2]), Shape::Message(""), "{name}: {word}");
        }
    }
}
