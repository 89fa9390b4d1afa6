{{/* What all pods and containers have in common. */}}

{{/* Metadata of a pod, of which a new version of the chart alone changes nothing: pods would be
replaced for it. Takes root, component, model, block, files (whose change must replace the pod). */}}
{{- define "infermesh.podMeta" -}}
annotations:
  checksum/config: {{ sha256sum .files }}
  {{- with .block.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
labels:
  {{- with .block.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- include "infermesh.selector" . | nindent 2 }}
{{- end -}}

{{/* How long a pod may take to end. Takes the drain. */}}
{{- define "infermesh.terminationSeconds" -}}
{{ .terminationSeconds | default (add .preStopSeconds .graceSeconds 10) }}
{{- end -}}

{{/* Where and as whom a pod runs. Takes root, name, component, model, block. Links to services are off: their
variables would begin with INFERMESH_, and be taken for settings. */}}
{{- define "infermesh.podCommon" -}}
serviceAccountName: {{ include "infermesh.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "infermesh.terminationSeconds" .block.drain }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with concat .root.Values.imagePullSecrets .root.Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .block.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.topologySpreadConstraints }}
{{- $own := dict "labelSelector" (dict "matchLabels" (include "infermesh.selector" $ | fromYaml)) }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml (merge (dict) (deepCopy .) (hasKey . "labelSelector" | ternary (dict) $own)) | indent 4 | trim }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* How a container starts, and what it may do. Takes root, block, module, section. */}}
{{- define "infermesh.containerCommon" -}}
image: {{ include "infermesh.image" (dict "root" .root "image" .block.image) }}
imagePullPolicy: {{ .block.image.pullPolicy }}
command: [python, -m, {{ .module }}]
args: [--config=/etc/infermesh/config/{{ .section }}.toml]
{{- with .block.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .block.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{ include "infermesh.containerSecurity" . }}
{{- end -}}

{{- define "infermesh.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Startup, readiness, liveness. Takes probes, port, and livePath. */}}
{{- define "infermesh.probes" -}}
startupProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  {{- toYaml .probes.startup | nindent 2 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  {{- toYaml .probes.readiness | nindent 2 }}
livenessProbe:
  httpGet: {path: {{ default "/healthz" .livePath }}, port: {{ .port }}}
  {{- toYaml .probes.liveness | nindent 2 }}
{{- end -}}

{{/* Takes drain. The kubelet sleeps: images need no shell. */}}
{{- define "infermesh.preStop" -}}
lifecycle:
  preStop:
    sleep: {seconds: {{ .drain.preStopSeconds }}}
{{- end -}}

{{/* Mounts of a container: its settings, its certificate, the operator's. Takes root, identity,
and container, which is its block. */}}
{{- define "infermesh.mounts" -}}
- {name: config, mountPath: /etc/infermesh/config, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if include "infermesh.tlsSecret" . }}
- {name: tls-{{ .identity }}, mountPath: /etc/infermesh/tls, readOnly: true}
{{- end }}
{{- with .container.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volumes of a pod. Takes root, configMap, identities, block. */}}
{{- define "infermesh.volumes" -}}
{{- $root := .root -}}
- name: config
  configMap: {name: {{ .configMap }}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- range $identity := .identities }}
{{- with include "infermesh.tlsSecret" (dict "root" $root "identity" $identity) }}
- name: tls-{{ $identity }}
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- with .block.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A volume that lasts: a claim of the chart's, or an existing one. Takes name, storage, own. */}}
{{- define "infermesh.lasting" -}}
- name: {{ .name }}
  {{- if .storage.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .storage.existingClaim }}}
  {{- else if .storage.size }}
  persistentVolumeClaim: {claimName: {{ .own }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end -}}

{{/* The spec of a claim. Takes storage. */}}
{{- define "infermesh.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .storage.storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .storage.size }}}
{{- end -}}

{{/* URLs with passwords: of Secrets, never of a ConfigMap. Take the block `auth`. */}}
{{- define "infermesh.databaseEnv" -}}
{{- if ne .database.kind "sqlite" -}}
- name: INFERMESH_AUTH__DATABASE_URL
  valueFrom:
    secretKeyRef: {name: {{ .database.urlSecret.name }}, key: {{ .database.urlSecret.key }}}
{{- end -}}
{{- end -}}

{{- define "infermesh.redisEnv" -}}
{{- with .redis.urlSecret -}}
{{- if .name -}}
- name: INFERMESH_AUTH__REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end -}}
{{- end -}}
{{- end -}}
