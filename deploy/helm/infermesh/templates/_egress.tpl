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
{{- else if and (hasPrefix "auth" .component) (or (ne .block.database.kind "sqlite") .block.redis.urlSecret.name) -}}
egress:
  {{- include "infermesh.dns" . | nindent 2 }}
  {{- $stores := list }}
  {{- if ne .block.database.kind "sqlite" }}{{ $stores = append $stores $root.Values.networkPolicy.database }}{{ end }}
  {{- if and .block.redis.urlSecret.name (eq .component "auth") }}{{ $stores = append $stores $root.Values.networkPolicy.redis }}{{ end }}
  {{- range $stores }}
  - to: {{- toYaml .to | nindent 6 }}
    ports: {{- include "infermesh.tcp" (list .port) | nindent 6 }}
  {{- end }}
{{- else if and (eq .component "replica") (include "infermesh.isFetched" .block) -}}
egress:
  {{- include "infermesh.dns" . | nindent 2 }}
  {{- with $root.Values.networkPolicy.download }}
  - ports: {{- include "infermesh.tcp" (list .port) | nindent 6 }} # the hub, a bucket
    {{- with .to }}
    to: {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- end }}
{{- else -}}
egress: []
{{- end }}
{{- end -}}
