{{/* The two containers of a replica. Take root, block (the merged model). */}}

{{/* A model's weights through the slowest way, and a minute or two for everything else. */}}
{{- define "infermesh.startupSeconds" -}}
{{ add 120 (ceil (divf (mulf .sizeGiB 1024) .loadMiBPerSecond)) }}
{{- end -}}

{{- define "infermesh.schedulerContainer" -}}
{{- $container := .block.scheduler -}}
{{- $period := $container.probes.startup.periodSeconds -}}
{{- $tries := ceil (divf (include "infermesh.startupSeconds" .block | float64) $period) | int -}}
{{- $startup := merge (dict) $container.probes.startup (dict "failureThreshold" $tries) -}}
{{- $probes := merge (dict "startup" $startup) $container.probes -}}
{{- include "infermesh.containerCommon" (dict "root" .root "block" $container "module" "services.scheduler" "section" "scheduler") }}
env:
  - name: INFERMESH_SCHEDULER__REPLICA_ID
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- with $container.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: grpc, containerPort: 8010}
  - {name: metrics, containerPort: 8011}
{{ include "infermesh.probes" (dict "probes" $probes "port" "metrics") }}
{{ include "infermesh.preStop" .block }}
volumeMounts:
  {{- include "infermesh.mounts" (dict "root" .root "identity" "scheduler") | nindent 2 }}
  - {name: run, mountPath: /run/infermesh}
{{- end -}}

{{- define "infermesh.shardContainer" -}}
{{- $container := deepCopy .block.shard -}}
{{- if eq .block.accelerator.kind "gpu" -}}
{{- $device := dict .block.accelerator.resource 1 -}}
{{- $_ := set $container "resources" (mergeOverwrite (deepCopy $container.resources) (dict "limits" $device)) -}}
{{- end -}}
{{- include "infermesh.containerCommon" (dict "root" .root "block" $container "module" "services.shard" "section" "shard") }}
env:
  {{- if hasPrefix "hf://" .block.source }}
  - {name: HF_HOME, value: /var/cache/huggingface}
  {{- with .block.download.tokenSecret }}
  {{- if .name }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
  {{- else }}
  - {name: HF_HUB_OFFLINE, value: "1"}
  {{- end }}
  {{- with $container.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: shard-metrics, containerPort: 8021}
{{ include "infermesh.probes" (dict "probes" $container.probes "port" "shard-metrics" "livePath" "/readyz") }}
{{ include "infermesh.preStop" .block }}
volumeMounts:
  {{- include "infermesh.mounts" (dict "root" .root "identity" "shard") | nindent 2 }}
  - {name: run, mountPath: /run/infermesh}
  {{- if hasPrefix "pvc://" .block.source }}
  - {name: model, mountPath: /models, readOnly: true}
  {{- else if hasPrefix "hf://" .block.source }}
  - {name: hub, mountPath: /var/cache/huggingface}
  {{- end }}
{{- end -}}
