{{/* infermesh.toml: what the operator set, and over it what the chart owns. */}}

{{/* One section. Takes name, settings. JSON's strings, numbers and lists are TOML's, too. */}}
{{- define "infermesh.section" -}}
[{{ .name }}]
{{- range $key, $value := .settings }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end -}}

{{/* A whole file. Takes root, section, settings (owned), config (the operator's), metricsPort,
and dangers: what the posture check shall let pass. */}}
{{- define "infermesh.file" -}}
{{- $settings := mergeOverwrite (deepCopy .config) .settings -}}
{{- $telemetry := dict "log_level" .root.Values.telemetry.logLevel "log_format" .root.Values.telemetry.logFormat -}}
{{- $_ := set $telemetry "metrics_address" (printf "0.0.0.0:%v" .metricsPort) -}}
{{- $dangers := .dangers -}}
{{- $security := dict -}}
{{- if eq .root.Values.tls.mode "plaintext" -}}
{{- $dangers = append $dangers "plaintext" -}}
{{- else -}}
{{- $_ := set $security "tls_folder" "/etc/infermesh/tls" -}}
{{- end -}}
{{- if $dangers -}}
{{- $_ := set $security "allow" (uniq $dangers) -}}
{{- end -}}
{{ include "infermesh.section" (dict "name" .section "settings" $settings) }}

{{ include "infermesh.section" (dict "name" "telemetry" "settings" $telemetry) }}
{{- if $security }}

{{ include "infermesh.section" (dict "name" "security" "settings" $security) }}
{{- end }}
{{- end -}}

{{- define "infermesh.gatewayFile" -}}
{{- $root := . -}}
{{- $replicas := list -}}
{{- range .Values.models -}}
{{- $replicas = append $replicas (printf "dns:%s:8010" (include "infermesh.host" (dict "root" $root "name" (printf "model-%s" .name)))) -}}
{{- end -}}
{{- $owned := dict "http_address" "0.0.0.0:8000" "admin_address" "127.0.0.1:8001" "grpc_address" "0.0.0.0:8002" -}}
{{- $_ := set $owned "replicas" $replicas -}}
{{- $_ := set $owned "drain_grace_s" .Values.gateway.drain.graceSeconds -}}
{{- /* keys travel in the clear from the Ingress on, as its backends' traffic does */ -}}
{{- $dangers := list "plaintext" -}}
{{- if .Values.auth.enabled -}}
{{- $_ := set $owned "auth" (list (printf "dns:%s:8030" (include "infermesh.host" (dict "root" . "name" "auth")))) -}}
{{- $_ := set $owned "usage_dir" "/var/lib/infermesh" -}}
{{- else -}}
{{- $dangers = append $dangers "no-auth" -}}
{{- end -}}
{{- if .Values.cache.enabled -}}
{{- $_ := set $owned "cache" (printf "%s:8040" (include "infermesh.host" (dict "root" . "name" "cache"))) -}}
{{- end -}}
{{ include "infermesh.file" (dict "root" . "section" "gateway" "settings" $owned "config" .Values.gateway.config "metricsPort" 8003 "dangers" $dangers) }}
{{- end -}}

{{- define "infermesh.authFile" -}}
{{- $owned := dict "address" "0.0.0.0:8030" "admin_address" "unix:/run/infermesh/admin.sock" -}}
{{- $_ := set $owned "drain_grace_s" .Values.auth.drain.graceSeconds -}}
{{- $_ := set $owned "first_key_file" "/etc/infermesh/first-key/api-key" -}}
{{- if eq .Values.auth.database.kind "sqlite" -}}
{{- $_ := set $owned "database_url" "sqlite:////var/lib/infermesh/auth.sqlite3" -}}
{{- end -}}
{{- if .Values.auth.jwt.keysSecret.name -}}
{{- $_ := set $owned "jwt_keys_file" "/etc/infermesh/jwt/jwks.json" -}}
{{- $_ := set $owned "jwt_issuer" .Values.auth.jwt.issuer -}}
{{- $_ := set $owned "jwt_audience" .Values.auth.jwt.audience -}}
{{- end -}}
{{ include "infermesh.file" (dict "root" . "section" "auth" "settings" $owned "config" .Values.auth.config "metricsPort" 8031 "dangers" (list)) }}
{{- end -}}

{{- define "infermesh.cacheFile" -}}
{{- $owned := dict "address" "0.0.0.0:8040" "data_dir" "/var/lib/infermesh" -}}
{{- $_ := set $owned "drain_grace_s" .Values.cache.drain.graceSeconds -}}
{{ include "infermesh.file" (dict "root" . "section" "cache" "settings" $owned "config" .Values.cache.config "metricsPort" 8041 "dangers" (list)) }}
{{- end -}}

{{/* "true" where files are fetched before the shard starts. Takes a merged model. */}}
{{- define "infermesh.isFetched" -}}
{{- if or (hasPrefix "hf://" .source) (hasPrefix "s3://" .source) -}}true{{- end -}}
{{- end -}}

{{/* The folder that the shard opens. Of what is fetched, its name says what is in it: another
revision or checksum is another folder. */}}
{{- define "infermesh.modelPath" -}}
{{- if include "infermesh.isFetched" . -}}
{{- $name := regexReplaceAll "^[a-z0-9]+://" .source "" | trimSuffix "/" | replace "/" "--" -}}
/models/{{ $name }}{{ with .checksum }}-{{ trimPrefix "sha256:" . | trunc 12 }}{{ end }}
{{- else if hasPrefix "path://" .source -}}
{{ trimPrefix "path://" .source }}
{{- else -}}
{{- $parts := splitn "/" 2 (trimPrefix "pvc://" .source) -}}
/models{{ with $parts._1 }}/{{ . }}{{ end }}
{{- end -}}
{{- end -}}

{{/* Take root and model, which is merged. */}}
{{- define "infermesh.schedulerFile" -}}
{{- $owned := dict "address" "0.0.0.0:8010" "shard" "unix:/run/infermesh/shard.sock" -}}
{{- $_ := set $owned "model" (include "infermesh.modelPath" .model) -}}
{{- $_ := set $owned "model_id" (default .model.name .model.modelId) -}}
{{- $_ := set $owned "dtype" .model.dtype -}}
{{- $_ := set $owned "quantize" .model.quantize -}}
{{- $_ := set $owned "drain_grace_s" .model.drain.graceSeconds -}}
{{ include "infermesh.file" (dict "root" .root "section" "scheduler" "settings" $owned "config" .model.scheduler.config "metricsPort" 8011 "dangers" (list)) }}
{{- end -}}

{{- define "infermesh.shardFile" -}}
{{- $owned := dict "address" "unix:/run/infermesh/shard.sock" -}}
{{- $_ := set $owned "device" (eq .model.accelerator.kind "gpu" | ternary "cuda" "cpu") -}}
{{- /* of the image, made when it was built */ -}}
{{- $_ := set $owned "kernels_dir" "/opt/infermesh/kernels" -}}
{{- /* a pod's files end with it: packed weights are kept where the operator says that they stay */ -}}
{{- $config := merge (deepCopy .model.shard.config) (dict "packed_cache_gib" 0) -}}
{{- /* both containers are told to stop at the same time: the shard computes for its scheduler */ -}}
{{- $_ := set $owned "drain_grace_s" (add .model.drain.graceSeconds 2) -}}
{{ include "infermesh.file" (dict "root" .root "section" "shard" "settings" $owned "config" $config "metricsPort" 8021 "dangers" (list)) }}
{{- end -}}
