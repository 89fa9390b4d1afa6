{{/* Ports of a NetworkPolicy. */}}
{{- define "infermesh.tcp" -}}
{{- range $i, $port := . }}
{{- if $i }}{{ "\n" }}{{ end -}}
- {port: {{ $port }}, protocol: TCP}
{{- end }}
{{- end -}}

{{- define "infermesh.dns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{/* The stores beyond its pod that auth, or its migration, speaks to. Takes root, component. */}}
{{- define "infermesh.stores" -}}
{{- $auth := .root.Values.auth -}}
{{- $stores := list -}}
{{- if ne $auth.database.kind "sqlite" }}{{ $stores = append $stores "database" }}{{ end -}}
{{- if and $auth.redis.urlSecret.name (eq .component "auth") }}{{ $stores = append $stores "redis" }}{{ end -}}
{{- join " " $stores -}}
{{- end -}}

{{/* Whom a component may call. Takes root, component, block. */}}
{{- define "infermesh.egress" -}}
{{- $root := .root -}}
{{- if eq .component "gateway" -}}
egress:
  {{- include "infermesh.dns" . | nindent 2 }}
  {{- $peers := list (list "replica" 8010) }}
  {{- if $root.Values.auth.enabled }}{{ $peers = append $peers (list "auth" 8030) }}{{ end }}
  {{- if $root.Values.cache.enabled }}{{ $peers = append $peers (list "cache" 8040) }}{{ end }}
  {{- range $peers }}
  - to:
      - podSelector:
          matchLabels: {{- include "infermesh.selector" (dict "root" $root "component" (index . 0)) | nindent 12 }}
    ports: {{- include "infermesh.tcp" (list (index . 1)) | nindent 6 }}
  {{- end }}
{{- else if and (hasPrefix "auth" .component) (include "infermesh.stores" .) -}}
egress:
  {{- include "infermesh.dns" . | nindent 2 }}
  {{- range include "infermesh.stores" . | splitList " " }}
  {{- $peers := index $root.Values.networkPolicy . }}
  - to: {{- toYaml $peers.to | nindent 6 }}
    ports: {{- include "infermesh.tcp" (list $peers.port) | nindent 6 }}
  {{- end }}
{{- else if and (eq .component "replica") (hasPrefix "hf://" .block.source) -}}
egress:
  {{- include "infermesh.dns" . | nindent 2 }}
  - ports: {{- include "infermesh.tcp" (list 443) | nindent 6 }} # the hub
{{- else -}}
egress: []
{{- end }}
{{- end -}}
