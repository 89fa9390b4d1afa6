BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE changes (
	sequence BIGINT NOT NULL, 
	key_id VARCHAR(32), 
	tenant_id VARCHAR(64), 
	changed_at BIGINT NOT NULL, 
	PRIMARY KEY (sequence)
);
CREATE TABLE counters (
	name VARCHAR(32) NOT NULL, 
	value BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "counters" VALUES('changes',0);
INSERT INTO "counters" VALUES('starts',1);
CREATE TABLE keys (
	id VARCHAR(32) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	hash BLOB NOT NULL, 
	scopes JSON NOT NULL, 
	models JSON NOT NULL, 
	created_at BIGINT NOT NULL, 
	expires_at BIGINT, 
	revoked_at BIGINT, replaced_by VARCHAR(32), 
	PRIMARY KEY (id), 
	FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
INSERT INTO "keys" VALUES('abcdefghijkl','local','first key',X'C527342729A2A7A5C5A8D253A1D4582B055555F1B4320067460C6A02344DFEA3','["inference", "embeddings", "models"]','[]',1750000000,NULL,NULL,NULL);
CREATE TABLE leases (
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	gateway_id VARCHAR(128) NOT NULL, 
	incarnation VARCHAR(64) NOT NULL, 
	granted_requests BIGINT NOT NULL, 
	granted_tokens BIGINT NOT NULL, 
	granted_slots BIGINT NOT NULL, 
	spent_requests BIGINT NOT NULL, 
	spent_tokens BIGINT NOT NULL, 
	returned_requests BIGINT NOT NULL, 
	returned_tokens BIGINT NOT NULL, 
	returned_slots BIGINT NOT NULL, 
	expires_at FLOAT NOT NULL, 
	is_over BOOLEAN NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE TABLE quotas (
	tenant_id VARCHAR(64) NOT NULL, 
	version BIGINT NOT NULL, 
	cells JSON NOT NULL, 
	day VARCHAR(10) NOT NULL, 
	day_tokens BIGINT NOT NULL, 
	month VARCHAR(7) NOT NULL, 
	month_tokens BIGINT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (tenant_id), 
	FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
INSERT INTO "quotas" VALUES('local',0,'[]','',0,'',0,0.0);
CREATE TABLE tenants (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	requests_per_minute BIGINT, 
	tokens_per_minute BIGINT, 
	max_concurrency BIGINT, 
	daily_tokens BIGINT, 
	monthly_tokens BIGINT, 
	weight FLOAT NOT NULL, 
	semantic_cache BOOLEAN NOT NULL, 
	reuse_policy VARCHAR(16) NOT NULL, 
	created_at BIGINT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "tenants" VALUES('local','First tenant',NULL,NULL,NULL,NULL,NULL,1.0,0,'',1750000000);
CREATE TABLE usage (
	id INTEGER NOT NULL, 
	record_id VARCHAR(64) NOT NULL, 
	request_id VARCHAR(128) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	key_id VARCHAR(32) NOT NULL, 
	model VARCHAR(256) NOT NULL, 
	endpoint VARCHAR(64) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	completion_tokens BIGINT NOT NULL, 
	cached_prompt_tokens BIGINT NOT NULL, 
	finished_unix_ms BIGINT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (record_id)
);
INSERT INTO "usage" VALUES(1,'record-1','request-1','local','abcdefghijkl','infermesh-demo','chat','ok',11,7,3,1750000000000);
CREATE INDEX ix_keys_tenant_id ON keys (tenant_id);
CREATE INDEX usage_by_tenant ON usage (tenant_id, finished_unix_ms);
CREATE INDEX ix_leases_tenant_id ON leases (tenant_id);
CREATE INDEX ix_leases_gateway_id ON leases (gateway_id);
COMMIT;
