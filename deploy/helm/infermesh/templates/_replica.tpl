{{/* The two containers of a replica. Take root, block (the merged model). */}}

{{/* A model's weights through the slowest way, and a minute or two for everything else. */}}
{{- define "infermesh.startupSeconds" -}}
{{ add 120 (ceil (divf (mulf .sizeGiB 1024) .loadMiBPerSecond)) }}
{{- end -}}

{{/* How long a rollout may wait for one replica: the download comes first. */}}
{{- define "infermesh.rolloutSeconds" -}}
{{- $download := ternary (ceil (divf (mulf .sizeGiB 1024) .download.minMiBPerSecond)) 0 (eq (include "infermesh.isFetched" .) "true") -}}
{{ add (include "infermesh.startupSeconds" .) 600 $download }}
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
  {{- include "infermesh.mounts" (dict "root" .root "identity" "scheduler" "container" $container) | nindent 2 }}
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
  - {name: HF_HUB_OFFLINE, value: "1"}
  {{- with $container.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: shard-metrics, containerPort: 8021}
{{ include "infermesh.probes" (dict "probes" $container.probes "port" "shard-metrics" "livePath" "/readyz") }}
{{ include "infermesh.preStop" .block }}
volumeMounts:
  {{- include "infermesh.mounts" (dict "root" .root "identity" "shard" "container" $container) | nindent 2 }}
  - {name: run, mountPath: /run/infermesh}
  {{- if not (hasPrefix "path://" .block.source) }}
  - {name: model, mountPath: /models, readOnly: true}
  {{- end }}
{{- end -}}

{{/* Fetches the model, or checks the one that is there. It alone has the token, and no probe's
budget: a slow download is no reason to begin it again. */}}
{{- define "infermesh.fetchContainer" -}}
{{- $isFetched := include "infermesh.isFetched" .block -}}
name: fetch
image: {{ include "infermesh.image" (dict "root" .root "image" .block.shard.image) }}
imagePullPolicy: {{ .block.shard.image.pullPolicy }}
command: [python, -m, services.shard.fetch]
args:
  - --folder={{ include "infermesh.modelPath" .block }}
  {{- if $isFetched }}
  - --source={{ .block.source }}
  {{- end }}
  {{- with .block.checksum }}
  - --checksum={{ . }}
  {{- end }}
env:
  {{- if hasPrefix "hf://" .block.source }}
  # on the volume: a pod's scratch is small
  - {name: HF_HOME, value: /models/.huggingface}
  {{- with .block.download.tokenSecret }}
  {{- if .name }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
  {{- else if hasPrefix "s3://" .block.source }}
  {{- with .block.download.s3 }}
  - {name: AWS_REGION, value: {{ .region | quote }}}
  {{- with .endpointUrl }}
  - {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
  {{- end }}
  {{- end }}
  {{- end }}
  {{- with .block.shard.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $from := .block.shard.extraEnvFrom }}
{{- with .block.download.s3.credentialsSecret }}
{{- $from = append $from (dict "secretRef" (dict "name" .)) }}
{{- end }}
{{- with $from }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.download.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{ include "infermesh.containerSecurity" . }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- if not (hasPrefix "path://" .block.source) }}
  - {name: model, mountPath: /models{{ if not $isFetched }}, readOnly: true{{ end }}}
  {{- end }}
  {{- with .block.shard.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
