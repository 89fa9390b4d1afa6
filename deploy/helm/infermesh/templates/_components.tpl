{{/* Every component that is there: name, component, model and block of each, as a JSON list. */}}
{{- define "infermesh.components" -}}
{{- $root := . -}}
{{- $found := list (dict "name" "gateway" "component" "gateway" "block" .Values.gateway) -}}
{{- if .Values.auth.enabled -}}
{{- $found = append $found (dict "name" "auth" "component" "auth" "block" .Values.auth) -}}
{{- end -}}
{{- if .Values.cache.enabled -}}
{{- $found = append $found (dict "name" "cache" "component" "cache" "block" .Values.cache) -}}
{{- end -}}
{{- range .Values.models -}}
{{- $model := include "infermesh.model" (dict "root" $root "model" .) | fromJson -}}
{{- $found = append $found (dict "name" (printf "model-%s" .name) "component" "replica" "model" .name "block" $model) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* A question to Prometheus. Takes root, query, threshold (per replica). */}}
{{- define "infermesh.trigger" -}}
- type: prometheus
  metricType: AverageValue
  metadata:
    serverAddress: {{ .root.Values.prometheus.address | quote }}
    query: {{ .query | quote }}
    threshold: {{ .threshold | quote }}
  {{- with .root.Values.prometheus.authentication }}
  {{- if .name }}
  authenticationRef: {name: {{ .name }}, kind: {{ .kind }}}
  {{- end }}
  {{- end }}
{{- end -}}
