{{/* Names, labels, addresses. */}}

{{- define "infermesh.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What a selector may hold: it never changes. Takes root and component. */}}
{{- define "infermesh.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 40 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
infermesh.io/model: {{ . }}
{{- end }}
{{- end -}}

{{- define "infermesh.labels" -}}
{{ include "infermesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: infermesh
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of an object, below its labels: its own, and those of every object. Takes root, own. */}}
{{- define "infermesh.annotations" -}}
{{- with merge (dict) (default (dict) .own) .root.Values.commonAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
{{- end -}}
{{- end -}}

{{/* A service's name in this cluster. Takes root and name. */}}
{{- define "infermesh.host" -}}
{{ include "infermesh.fullname" .root }}-{{ .name }}.{{ .root.Release.Namespace }}.svc
{{- end -}}

{{- define "infermesh.image" -}}
{{ with .root.Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .root.Chart.AppVersion .image.tag }}{{ end }}
{{- end -}}

{{- define "infermesh.serviceAccountName" -}}
{{- if .block.serviceAccount.name -}}
{{ .block.serviceAccount.name }}
{{- else if .block.serviceAccount.create -}}
{{ include "infermesh.fullname" .root }}-{{ .name }}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "infermesh.firstKeySecret" -}}
{{ default (printf "%s-first-key" (include "infermesh.fullname" .)) .Values.auth.firstKeySecret.name }}
{{- end -}}

{{/* The Secret with a service's certificate; empty without TLS. Takes root and identity. */}}
{{- define "infermesh.tlsSecret" -}}
{{- if eq .root.Values.tls.mode "certManager" -}}
{{ include "infermesh.fullname" .root }}-{{ .identity }}-tls
{{- else if eq .root.Values.tls.mode "secrets" -}}
{{ index .root.Values.tls.secrets .identity }}
{{- end -}}
{{- end -}}

{{/* One entry of `models` over `modelDefaults`, its containers over those of every model. */}}
{{- define "infermesh.model" -}}
{{- $own := mergeOverwrite (deepCopy .root.Values.modelDefaults) (deepCopy .model) -}}
{{- $scheduler := mergeOverwrite (deepCopy .root.Values.scheduler) (deepCopy $own.scheduler) -}}
{{- $shard := mergeOverwrite (deepCopy .root.Values.shard) (deepCopy $own.shard) -}}
{{- toJson (mergeOverwrite $own (dict "scheduler" $scheduler "shard" $shard)) -}}
{{- end -}}
