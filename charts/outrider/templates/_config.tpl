{{/* Ports inside a pod: gRPC (TCP), QUIC (UDP), metrics and health (TCP). */}}
{{- define "outrider.port" -}}
{{- get (dict "coordinator" "9800" "storage" "9811" "observability" "9809") . -}}
{{- end -}}

{{/* Protocol of a role's port. */}}
{{- define "outrider.protocol" -}}
{{- get (dict "coordinator" "TCP" "storage" "UDP") . -}}
{{- end -}}

{{/* Address of a pod inside the cluster. Takes (list $ role ordinal). */}}
{{- define "outrider.inside" -}}
{{- $root := index . 0 -}}
{{- $set := include "outrider.set" . -}}
{{- printf "%s-%d.%s.%s.svc.%s:%s" $set (int (index . 2)) $set $root.Release.Namespace $root.Values.clusterDomain (include "outrider.port" (index . 1)) -}}
{{- end -}}

{{/* Address of a pod for agents outside the cluster. Takes (list $ role ordinal). */}}
{{- define "outrider.advertised" -}}
{{- $expose := (index (index . 0).Values (index . 1)).expose -}}
{{- $ordinal := int (index . 2) -}}
{{- $port := include "outrider.port" (index . 1) -}}
{{- if eq $expose.type "NodePort" -}}
{{- printf "%s:%d" $expose.host (add (int $expose.nodePortBase) $ordinal) -}}
{{- else if eq $expose.type "LoadBalancer" -}}
{{- printf "%s:%s" (replace "{ordinal}" (toString $ordinal) $expose.hostTemplate) $port -}}
{{- else if eq $expose.type "HostPort" -}}
{{- printf "${OUTRIDER_HOST_IP}:%s" $port -}}
{{- else -}}
{{- include "outrider.inside" . -}}
{{- end -}}
{{- end -}}

{{/* A value in TOML. YAML numbers arrive as floats, TOML tells 3 from 3.0. */}}
{{- define "outrider.toml.value" -}}
{{- if kindIs "string" . -}}{{ . | toJson }}
{{- else if and (kindIs "float64" .) (eq (float64 (int64 .)) .) -}}{{ int64 . }}
{{- else -}}{{ . }}
{{- end -}}
{{- end -}}

{{/* Keys and sections from values. */}}
{{- define "outrider.toml" -}}
{{- range $key, $value := . }}
{{- if not (kindIs "map" $value) }}
{{ $key }} = {{ include "outrider.toml.value" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}

[{{ $key }}]
{{- range $inner, $leaf := $value }}
{{ $inner }} = {{ include "outrider.toml.value" $leaf }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What both roles say. Takes (list $ role ordinal). */}}
{{- define "outrider.config.shared" -}}
{{- $root := index . 0 -}}
name = "{{ include "outrider.set" . }}-{{ index . 2 }}"
fabric = {{ $root.Values.fabric | quote }}
identity_dir = "/etc/outrider/identity"
data_dir = "/var/lib/outrider"
listen = "0.0.0.0:{{ include "outrider.port" (index . 1) }}"
observability = "0.0.0.0:{{ include "outrider.port" "observability" }}"
{{- end -}}

{{/* What the chart sets in sections, under what the values add to them. Takes (list $ role). */}}
{{- define "outrider.config.sections" -}}
{{- $root := index . 0 -}}
{{- $sections := dict -}}
{{- with $root.Values.observability.otlpEndpoint -}}
{{- $_ := set $sections "telemetry" (dict "otlp_endpoint" .) -}}
{{- end -}}
{{- if eq (index . 1) "coordinator" -}}
{{- $layout := $root.Values.layout -}}
{{- $_ := set $sections "storage" (dict "nodes" (int $root.Values.storage.replicas) "pg_count" (int $layout.pgCount) "replicas" (int $layout.replicas) "min_durable" (int $layout.minDurable)) -}}
{{- end -}}
{{- include "outrider.toml" (mergeOverwrite $sections (deepCopy (index $root.Values (index . 1)).config)) -}}
{{- end -}}

{{/* coordinator.toml of one member. Takes (list $ "coordinator" ordinal). */}}
{{- define "outrider.config.coordinator" -}}
{{- $root := index . 0 -}}
{{- $ordinal := int (index . 2) -}}
id = {{ add $ordinal 1 }}
{{ include "outrider.config.shared" . }}
kek_file = "/etc/outrider/kek/kek"
advertise = "{{ include "outrider.advertised" . }}"
members = [
{{- range $i := until (int $root.Values.coordinator.replicas) }}
  { id = {{ add $i 1 }}, address = "{{ include "outrider.advertised" (list $root "coordinator" $i) }}" },
{{- end }}
]
{{- include "outrider.config.sections" . }}
{{- end -}}

{{/* storage.toml of one storage node. Takes (list $ "storage" ordinal). */}}
{{- define "outrider.config.storage" -}}
{{- $root := index . 0 -}}
{{- $ordinal := int (index . 2) -}}
{{- $zones := $root.Values.storage.zones -}}
{{ include "outrider.config.shared" . }}
advertise = ["{{ include "outrider.advertised" . }}"]
coordinators = [
{{- range $i := until (int $root.Values.coordinator.replicas) }}
  "{{ include "outrider.inside" (list $root "coordinator" $i) }}",
{{- end }}
]
{{- if $zones }}
zone = {{ index $zones (mod $ordinal (len $zones)) | quote }}
{{- else }}
zone = "{{ include "outrider.set" . }}-{{ $ordinal }}"
{{- end }}
capacity = {{ $root.Values.storage.capacity | quote }}
segment_size = {{ $root.Values.storage.segmentSize | quote }}
{{- include "outrider.config.sections" . }}
{{- end -}}
