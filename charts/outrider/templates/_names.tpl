{{/* Base of all names; at most 40 characters, so that pod names stay DNS labels. */}}
{{- define "outrider.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Name of the StatefulSet of a role; its pods append their ordinal. Takes (list $ role). */}}
{{- define "outrider.set" -}}
{{- printf "%s-%s" (include "outrider.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{/* Labels that select the pods of a role. Takes (list $ role). */}}
{{- define "outrider.selector" -}}
app.kubernetes.io/name: outrider
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object. Takes (list $ role). */}}
{{- define "outrider.labels" -}}
{{ include "outrider.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end -}}

{{/* Name of the Secret with the identity of a pod. Takes (list $ role ordinal). */}}
{{- define "outrider.identitySecret" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- $prefix := default (include "outrider.set" .) $values.identitySecretPrefix -}}
{{- printf "%s-%d" $prefix (int (index . 2)) -}}
{{- end -}}
