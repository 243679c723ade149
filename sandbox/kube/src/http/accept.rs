//! In which form a client wants the answer.

/// What the `Accept` header asks for, the first form that is known here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Accept {
    /// Whole objects.
    Json,
    /// A table with this version of `meta.k8s.io`.
    Table(&'static str),
    /// Only the metadata.
    Metadata,
    /// The protobuf form of the OpenAPI document.
    OpenApiProtobuf,
    /// Nothing that can be given.
    Nothing,
}

impl Accept {
    pub fn parse(header: &str) -> Accept {
        if header.trim().is_empty() {
            return Accept::Json;
        }
        for range in header.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or("");
            let parameters: Vec<&str> = parts.collect();
            let parameter = |name: &str| {
                parameters
                    .iter()
                    .find_map(|p| p.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')))
            };
            if media.starts_with("application/com.github.proto-openapi") {
                return Accept::OpenApiProtobuf;
            }
            if !matches!(
                media,
                "application/json" | "*/*" | "application/*" | "text/plain" | "application/yaml"
            ) {
                continue;
            }
            match (parameter("as"), parameter("v")) {
                (Some("Table"), Some("v1beta1")) => return Accept::Table("v1beta1"),
                (Some("Table"), _) => return Accept::Table("v1"),
                (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), _) => return Accept::Metadata,
                // Aggregated discovery is not given; clients then take the plain form.
                (Some(_), _) => continue,
                (None, _) => return Accept::Json,
            }
        }
        Accept::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_form_wins() {
        assert_eq!(Accept::parse(""), Accept::Json);
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(Accept::parse(table), Accept::Table("v1"));
        assert_eq!(
            Accept::parse("application/vnd.kubernetes.protobuf,application/json"),
            Accept::Json
        );
        assert_eq!(
            Accept::parse("application/vnd.kubernetes.protobuf"),
            Accept::Nothing
        );
        let discovery =
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(Accept::parse(discovery), Accept::Json);
    }
}
