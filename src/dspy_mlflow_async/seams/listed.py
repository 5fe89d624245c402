"""List of every undocumented name of DSPy, MLflow and OpenTelemetry that this package touches.

A test holds this list against the source, so that no name is touched in silence.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from dspy_mlflow_async.seams.check import Fault, Seam, faults

_PROVIDER = "mlflow.tracing.provider"
_MANAGER = "mlflow.tracing.trace_manager:InMemoryTraceManager"
_UTILS = "mlflow.tracing.utils"
_CALLBACK = "mlflow.dspy.callback:MlflowCallback"
_PROCESSOR = "mlflow.tracing.processor.mlflow_v3:MlflowV3SpanProcessor"
_EXPORTER = "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter"
_SQL_STORE = "mlflow.store.tracking.sqlalchemy_store"
_REST_STORE = "mlflow.store.tracking.rest_store:RestStore"
_MODELS = "mlflow.store.tracking.dbmodels.models"
_ANALYTICS = "mlflow.store.tracking.utils.trace_analytics"
_TRANSLATION = "mlflow.tracing.otel.translation"
_FLUENT = "mlflow.tracking.fluent"
_CALLBACK_STATE = "answers those who read the state of MLflow's own callback"
_WORKERS = "makes DSPy's worker threads take up the tracing context"
_HANDLERS = "chooses a handler once per type, and ends what was begun when another callback is interrupted"
_SETTINGS = "reads and changes DSPy's settings where dspy.configure would raise"
_CONTEXT = "carries MLflow's current span, session and tags between threads and tasks"
_SPANS = "begins and ends spans as MLflow does, with fewer steps"
_CALLS = "makes the parts of a call's span only when somebody asks for them"
_MEDIA = "finds pictures, recordings and files in the text of DSPy's types"
_EXPORT = "hands MLflow the exporter that writes whole traces"
_BEGIN = "starts a trace as MLflow's processor does, with fewer steps"
_WRITE = "writes a trace as MLflow's own exporter does"
_RUNS = "gives each evaluation and compile its own run"
_EVALUATE = "lets AsyncEvaluate give the tables and files that dspy.Evaluate gives"
_CAPTURE = "keeps traces in memory for tests"
_SCOPE = "gives the traces of one request their own destination and sampling"
_BY_ID = "lets what links a trace to a run or a prompt find one that waits"
_EXPERIMENT = "tells the experiment of a trace without opening the store in the caller's thread"
_PRICES = "prices a span without importing LiteLLM in the writer's thread"
_ROWS = "writes complete traces to a SQL store as rows"
_FORK = "keeps a forked process from inheriting held locks and open connections"
_WHOLE = "sends many whole traces in one request to a server that takes them"
_SERVER = "lets an mlflow server take many whole traces in one request"
_ROWS_AND_AUDIT = "writes complete traces to a SQL store as rows, and lets the audit read many at once"

SEAMS: tuple[Seam, ...] = (
    # DSPy
    Seam("dspy.adapters.types.base_type:CUSTOM_TYPE_START_IDENTIFIER", _MEDIA, shape=".encode", is_feature=True),
    Seam("dspy.adapters.types.base_type:CUSTOM_TYPE_END_IDENTIFIER", _MEDIA, shape=".encode", is_feature=True),
    Seam("dspy.dsp.utils.settings:main_thread_config", _SETTINGS, shape=".get .__setitem__"),
    Seam("dspy.dsp.utils.settings:thread_local_overrides", _SETTINGS, shape=".get .set"),
    Seam("dspy.dsp.utils.utils:dotdict", _SETTINGS, shape=".items"),
    Seam("dspy.utils.parallelizer:ParallelExecutor", _WORKERS, shape=".execute", is_feature=True),
    Seam("dspy.utils.parallelizer:ParallelExecutor.execute", _WORKERS, shape="(self, function, data)", is_feature=True),
    Seam(
        "dspy.utils.callback_context:ACTIVE_CALL_ID",
        "tells which DSPy call is around a call",
        shape=".get .set",
        is_feature=True,
    ),
    Seam("dspy.utils.usage_tracker:UsageTracker", "counts the tokens of exactly one LM call", shape="() .add_usage"),
    Seam(
        "dspy.utils.usage_tracker:UsageTracker._flatten_usage_entry",
        "counts the tokens of exactly one LM call",
        shape="(self, entry)",
    ),
    Seam("dspy.evaluate.evaluate:EvaluationResult", _EVALUATE, shape="(score=, results=)", is_feature=True),
    Seam(
        "dspy.evaluate.evaluate:Evaluate._construct_result_table",
        _EVALUATE,
        shape="(self, results, name)",
        is_feature=True,
    ),
    Seam(
        "dspy.evaluate.evaluate:Evaluate._display_result_table",
        _EVALUATE,
        shape="(self, table, rows, name)",
        is_feature=True,
    ),
    Seam(
        "dspy.evaluate.evaluate:Evaluate._prepare_results_output", _EVALUATE, shape="(results, name)", is_feature=True
    ),
    Seam("dspy.utils.callback:with_callbacks", _EVALUATE, shape="(fn)", is_feature=True),
    Seam("dspy.utils.callback:_get_on_start_handler", _HANDLERS, shape="(callback, instance, fn)", is_optional=True),
    Seam("dspy.utils.callback:_get_on_end_handler", _HANDLERS, shape="(callback, instance, fn)", is_optional=True),
    Seam("dspy.utils.callback:inspect", "tells the arguments of a call faster", shape=".signature", is_optional=True),
    Seam("dspy.utils.callback:uuid", "makes the ids of calls without the system", shape=".uuid4", is_optional=True),
    # MLflow, the context that tells which span is current
    Seam(f"{_PROVIDER}:mlflow_runtime_context", _CONTEXT),
    Seam(f"{_PROVIDER}:mlflow_runtime_context._current_context", _CONTEXT, shape=".get .set"),
    Seam(f"{_PROVIDER}:_MLFLOW_TRACE_USER_DESTINATION", _CONTEXT),
    Seam(f"{_PROVIDER}:_MLFLOW_TRACE_USER_DESTINATION._context_local_value", _CONTEXT, shape=".get .set"),
    Seam("mlflow.tracing.config:get_config", _SPANS, shape="()"),
    Seam("mlflow.tracing.context:_USER_TRACE_CONTEXT", _CONTEXT, shape=".get .set"),
    Seam("mlflow.tracing.context:_UserTraceContext", _CONTEXT, shape="(metadata=, tags=, enabled=)"),
    Seam("mlflow.tracing.sampling:_SAMPLING_RATIO_OVERRIDE", _CONTEXT, shape=".get .set"),
    Seam("mlflow.pyfunc.context:_PREDICTION_REQUEST_CTX", _CONTEXT, shape=".get .set", is_optional=True),
    Seam(
        "mlflow.pyfunc.context:get_prediction_context",
        "tags a served model's traces with its schema",
        shape="()",
        is_feature=True,
    ),
    # MLflow, spans
    Seam(f"{_PROVIDER}:provider", _SPANS, shape=".get"),
    Seam(f"{_PROVIDER}:provider.once", _SPANS, shape=".do_once"),
    Seam(f"{_PROVIDER}:provider._isolated_tracer_provider", _SPANS, shape="?.get_tracer"),
    Seam(f"{_PROVIDER}:_initialize_tracer_provider", _SPANS, shape="()"),
    Seam(_MANAGER, _SPANS, shape=".get_instance .get_trace .pop_trace .register_trace"),
    Seam("mlflow.entities.span:_SpanAttributesRegistry", _SPANS, shape="(span)"),
    Seam(
        "mlflow.entities.span:LiveSpan._extract_attachments",
        "keeps images and audio as attachments",
        shape="(self, value, extract) | (self, value)",
        is_feature=True,
    ),
    Seam("mlflow.entities.span:Span._span", _SPANS, shape=".context .start_time"),
    Seam("mlflow.entities.span:Span._original_name", _SPANS, shape=".encode", is_optional=True),
    Seam("mlflow.entities.span:Span._attachments", _WRITE, shape=".values"),
    Seam("mlflow.entities.span:Span._links", _WRITE, is_optional=True),
    Seam(
        "mlflow.tracing.distributed:TraceContextTextMapPropagator",
        "adds up the tokens of a trace that goes on in other processes",
        shape="() .inject",
        is_feature=True,
    ),
    Seam(f"{_UTILS}:encode_span_id", _SPANS, shape="(span_id)"),
    Seam(f"{_UTILS}:set_span_cost_attribute", _SPANS, shape="(span)", is_feature=True),
    Seam(f"{_UTILS}:should_compute_cost_client_side", _SPANS, shape="()", is_feature=True),
    Seam("mlflow.tracking._tracking_service.utils:get_tracking_uri", _SPANS, shape="()"),
    Seam("mlflow.tracking._tracking_service.utils:is_tracking_uri_set", _SPANS, shape="()"),
    Seam("os:environ._data", _SPANS, is_optional=True),
    Seam(f"{_UTILS}.processor:apply_span_processors", _SPANS, shape="(span)"),
    Seam(f"{_UTILS}.default_log_level:default_log_level_for_span_type", _SPANS, shape="(span_type)", is_optional=True),
    # MLflow, its own integration, which ours replaces
    Seam(_CALLBACK, "is the base of our callback, by which MLflow finds it", shape="(schema) .on_module_start"),
    Seam(f"{_CALLBACK}._call_id_to_span", _CALLBACK_STATE, is_optional=True),
    Seam(f"{_CALLBACK}._call_id_to_module", _CALLBACK_STATE, is_optional=True),
    Seam(f"{_CALLBACK}._call_id_to_metric_key", _CALLBACK_STATE, is_optional=True),
    Seam(f"{_CALLBACK}._evaluation_counter", _CALLBACK_STATE, is_optional=True),
    Seam(f"{_CALLBACK}._dependencies_schema", "tags a served model's traces with its schema", is_optional=True),
    Seam("mlflow.dspy.autolog:safe_patch", "keeps a later mlflow.dspy.autolog() from doubling the spans"),
    Seam(
        "mlflow.dspy.util:EXCLUDE_LM_PARAMS",
        "leaves the LM arguments out that MLflow leaves out",
        is_feature=True,
        shape=".__contains__",
    ),
    Seam(
        "mlflow.utils.autologging_utils:AUTOLOGGING_INTEGRATIONS",
        "sees whether MLflow's own autolog is on",
        shape=".get .__setitem__",
    ),
    Seam(
        "mlflow.utils.autologging_utils.safety:revert_patches",
        "switches MLflow's own autolog off",
        shape="(integration)",
    ),
    # MLflow, export
    Seam(f"{_PROVIDER}:_get_mlflow_span_processor", _EXPORT, shape="(uri)"),
    Seam("mlflow.tracking._tracking_service.client:TrackingServiceClient", _BY_ID, shape="(uri)"),
    Seam("mlflow.tracking._model_registry.client:ModelRegistryClient", _BY_ID, is_optional=True),
    Seam(
        f"{_PROVIDER}:trace_disabled",
        "keeps MLflow's log_model, load_model and evaluations from switching tracing off for all threads",
        shape="(f)",
        is_optional=True,
    ),
    Seam(f"{_PROVIDER}:_trace_disabled_state", _EXPORT, shape=".get", is_optional=True),
    Seam(_PROCESSOR, _EXPORT, shape="(span_exporter=, export_metrics=) .on_start .on_end"),
    Seam(f"{_PROCESSOR}._start_trace", _EXPORT, shape="(self, root_span)"),
    Seam(f"{_PROCESSOR}._get_basic_trace_metadata", _BEGIN, shape="(self)", is_optional=True),
    Seam(f"{_PROCESSOR}._get_basic_trace_tags", _BEGIN, shape="(self, span)", is_optional=True),
    Seam(f"{_PROCESSOR}._export_metrics", _EXPORT, shape=".__bool__"),
    Seam(f"{_PROCESSOR}._truncate_metadata", _WRITE, shape="(self, value)"),
    Seam(f"{_PROCESSOR}._deduplication_lock", _FORK, shape=".acquire", is_optional=True),
    Seam(f"{_PROCESSOR}._batch_delegate", _EXPORT, is_optional=True),
    Seam(f"{_PROCESSOR}._pending_on_end_condition", _FORK, shape=".notify", is_optional=True),
    Seam(f"{_PROCESSOR}._pending_on_end_count", _FORK, shape=".__add__", is_optional=True),
    Seam("mlflow.tracing.processor:base_mlflow", _EXPORT, shape=".__spec__"),
    Seam("mlflow.tracing.processor.base_mlflow:retire_batch_processor", _EXPORT, shape="(processor)", is_optional=True),
    Seam(_EXPORTER, _EXPORT, shape="(uri) .export"),
    Seam(
        f"{_EXPORTER}._async_queue",
        "lets mlflow.flush_trace_async_logging wait for our exporter",
        is_feature=True,
    ),
    Seam(f"{_EXPORTER}._client", _EXPORT, is_optional=True),
    Seam(f"{_EXPORTER}._is_async_enabled", _EXPORT, is_optional=True),
    Seam(f"{_EXPORTER}._should_enable_async_logging", _EXPORT, shape="(self)", is_optional=True),
    Seam(f"{_EXPORTER}._deferred_lock", _EXPORT, is_optional=True),
    Seam(f"{_EXPORTER}._deferred_root_spans", _EXPORT, is_optional=True),
    Seam("mlflow.tracing.export.async_export_queue:AsyncTraceExportQueue._stop_event", _EXPORT),
    Seam(
        "mlflow.tracing.export.inference_table:maybe_add_trace_to_serving_buffer",
        _WRITE,
        shape="(trace)",
        is_optional=True,
    ),
    Seam(f"{_MANAGER}._lock", _FORK, shape=".acquire .release"),
    Seam(f"{_MANAGER}._otel_id_to_mlflow_trace_id", _EXPORT, shape=".get .pop .__setitem__"),
    Seam(f"{_MANAGER}._traces", _EXPORT, shape=".get .__delitem__ .__setitem__"),
    Seam("mlflow.tracing.trace_manager:_Trace", _EXPORT, shape="(info)"),
    Seam("mlflow.tracing:provider", _EXPORT, shape=".__spec__"),
    Seam("mlflow.tracing.attachments:Attachment", _WRITE, shape="(content_type=, content_bytes=)"),
    Seam("mlflow.tracing.attachments:Attachment._id", _WRITE, shape=".encode"),
    Seam("mlflow.tracing.client:TracingClient", _WRITE, shape="(uri)"),
    Seam("mlflow.tracing.client:TracingClient._upload_attachments", _WRITE, shape="(self, info, attachments)"),
    Seam("mlflow.tracing.client:TracingClient._upload_trace_data", _WRITE, shape="(self, info, data)"),
    Seam("mlflow.tracing.display:get_display_handler", _WRITE, shape="()", is_feature=True),
    Seam("mlflow.tracing.fluent:_EVAL_REQUEST_ID_TO_TRACE_ID", _WRITE, shape=".__setitem__", is_feature=True),
    Seam("mlflow.tracing.fluent:_set_last_active_trace_id", _WRITE, shape="(trace_id)", is_feature=True),
    Seam(f"{_UTILS}:add_size_stats_to_trace_metadata", _WRITE, shape="(trace)", is_feature=True),
    Seam(f"{_UTILS}:TraceJSONEncoder", _WRITE, shape="(ensure_ascii=) .encode", is_feature=True),
    Seam(f"{_UTILS}:_calculate_percentile", _WRITE, shape="(sizes, percentile)", is_optional=True),
    Seam(f"{_UTILS}:aggregate_cost_from_spans", _WRITE, shape="(spans)", is_feature=True),
    Seam(f"{_UTILS}:aggregate_usage_from_spans", _WRITE, shape="(spans)", is_feature=True),
    Seam(f"{_UTILS}:generate_assessment_id", _WRITE, shape="()", is_feature=True),
    Seam(f"{_UTILS}:get_otel_attribute", _EXPERIMENT, shape="(span, key)"),
    Seam("mlflow.tracking.default_experiment:DEFAULT_EXPERIMENT_ID", _EXPERIMENT, shape=".encode", is_feature=True),
    Seam("mlflow.tracking.default_experiment:registry", _EXPERIMENT, shape=".__spec__", is_feature=True),
    Seam(
        "mlflow.tracking.default_experiment.registry:_default_experiment_provider_registry",
        _EXPERIMENT,
        is_feature=True,
        shape=".__iter__",
    ),
    Seam("mlflow.tracking.default_experiment.registry:get_experiment_id", _EXPERIMENT, shape="()", is_feature=True),
    Seam(f"{_FLUENT}:_get_latest_active_run", _EXPERIMENT, shape="()"),
    Seam(f"{_UTILS}:maybe_get_request_id", _WRITE, shape="(is_evaluate=)", is_feature=True),
    Seam(f"{_UTILS}:update_trace_state_from_span_conditionally", _WRITE, shape="(trace, root)"),
    Seam(f"{_UTILS}.otlp:resource_to_otel_proto", _WRITE, shape="(resource)", is_feature=True),
    Seam(f"{_UTILS}.otlp:should_export_otlp_metrics", _WRITE, shape="()", is_feature=True),
    Seam(f"{_UTILS}.truncation:set_request_response_preview", _WRITE, shape="(info, data)", is_feature=True),
    Seam(
        "mlflow.tracking._tracking_service.utils:_has_existing_mlruns_data",
        "names the default store with mlflow-tracing alone",
        shape="()",
        is_optional=True,
    ),
    Seam("mlflow.tracking._tracking_service:utils", _WRITE, shape=".__spec__"),
    Seam("mlflow.tracking._tracking_service.utils:_get_store", _FORK, shape="(uri)"),
    Seam("mlflow.tracking._tracking_service.utils:_resolve_tracking_uri", _WRITE, shape="(uri)"),
    Seam("mlflow.protos.service_pb2:StartTraceV3", _WRITE, shape=".DESCRIPTOR", is_feature=True),
    Seam(_REST_STORE, _WRITE, shape=".start_trace", is_feature=True),
    Seam(
        f"{_REST_STORE}._call_endpoint", _WRITE, is_feature=True, shape="(self, api, body, endpoint=, response_proto=)"
    ),
    Seam(f"{_REST_STORE}._get_server_version", _WRITE, shape="(creds)"),
    Seam(f"{_SQL_STORE}:SqlAlchemyStore.ManagedSessionMaker", _WRITE, is_optional=True),
    Seam(f"{_SQL_STORE}:SqlAlchemyStore._run_with_deadlock_retry", _WRITE, shape="(self, fn)", is_optional=True),
    Seam(f"{_SQL_STORE}:SqlAlchemyStore._start_trace_once", _WRITE, shape="(self, info)", is_optional=True),
    Seam("mlflow.utils.databricks_utils:get_workspace_url", _WRITE, shape="()", is_feature=True),
    Seam("mlflow.utils.databricks_utils:is_in_databricks_notebook", _WRITE, shape="()", is_feature=True),
    Seam("mlflow.tracking:MlflowClient._tracking_client", _WRITE, is_optional=True),
    Seam(
        "mlflow.tracking._tracking_service.client:TrackingServiceClient._log_url",
        _WRITE,
        shape="(self, run_id)",
        is_optional=True,
    ),
    Seam("mlflow.tracking.request_header:registry", _WRITE, shape=".__spec__"),
    Seam("mlflow.tracking.request_header.registry:resolve_request_headers", _WRITE, shape="(headers)", is_feature=True),
    Seam(
        "mlflow.tracking.request_header.registry:DatabricksRequestHeaderProvider",
        _WRITE,
        shape="() .in_context",
        is_feature=True,
    ),
    Seam(
        "mlflow.tracking.request_header.registry:_request_header_provider_registry",
        _WRITE,
        shape=".__iter__",
        is_feature=True,
    ),
    Seam("requests.sessions:get_environ_proxies", _WRITE, shape="(url, no_proxy)", is_optional=True),
    Seam("mlflow.utils.proto_json_utils:message_to_json", _WRITE, shape="(message)", is_feature=True),
    Seam("mlflow.utils.rest_utils:_V3_TRACE_REST_API_PATH_PREFIX", _WRITE, shape=".encode", is_feature=True),
    Seam("mlflow.utils:rest_utils", "bounds how long one write may take", shape=".__spec__"),
    Seam(
        "mlflow.utils.rest_utils:_get_http_response_with_retries",
        "bounds how long one write may take",
        is_feature=True,
        shape="(method, url, retries, factor, jitter, codes, raises, timeout=)",
    ),
    Seam("mlflow.utils.uri:is_databricks_uri", _WRITE, shape="(uri)"),
    Seam("mlflow.utils:workspace_context", _WRITE, shape=".__spec__"),
    Seam("mlflow.utils.workspace_context:get_request_workspace", _WRITE, shape="()"),
    Seam("mlflow.utils.workspace_context:_WORKSPACE", _WRITE, shape=".get", is_optional=True),
    Seam(
        "mlflow.utils.workspace_context:ServerWorkspaceContext",
        _WRITE,
        shape="(workspace) .__enter__",
        is_optional=True,
    ),
    # MLflow, the tables of its SQL store
    Seam(f"{_MODELS}:SqlTraceInfo", _ROWS_AND_AUDIT, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlTraceTag", _ROWS_AND_AUDIT, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlTraceMetadata", _ROWS_AND_AUDIT, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlTraceMetrics", _ROWS, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlSpan", _ROWS_AND_AUDIT, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlSpanMetrics", _ROWS, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlExperiment", _ROWS, shape=".__table__", is_optional=True),
    Seam(f"{_MODELS}:SqlAssessments", _ROWS_AND_AUDIT, shape=".__table__ .from_mlflow_entity", is_optional=True),
    Seam(f"{_SQL_STORE}:SqlAlchemyStore", _ROWS, shape=".start_trace .log_spans", is_optional=True),
    Seam(
        f"{_SQL_STORE}:SqlAlchemyStore._get_trace_artifact_location_tag",
        _ROWS,
        shape="(self, experiment, trace_id)",
        is_optional=True,
    ),
    Seam(f"{_SQL_STORE}:_try_parse_json_string", _ROWS, shape="(value)", is_optional=True),
    Seam(f"{_TRANSLATION}:translate_span_when_storing", _ROWS, shape="(span)", is_optional=True),
    Seam(f"{_TRANSLATION}:sanitize_attributes", _ROWS, shape="(attributes)", is_optional=True),
    Seam(f"{_TRANSLATION}:update_cost", _ROWS, shape="(total, cost)", is_optional=True),
    Seam(f"{_UTILS}:dump_span_attribute_value", _ROWS, shape="(value)", is_optional=True),
    Seam(f"{_UTILS}:SpanAggregationNode", _ROWS, shape="(span_id=, parent_id=, data=)", is_optional=True),
    Seam(f"{_UTILS}:aggregate_cost_from_span_nodes", _ROWS, shape="(nodes)", is_optional=True),
    Seam(f"{_UTILS}:aggregate_usage_from_span_nodes", _WRITE, shape="(nodes)", is_optional=True),
    Seam(f"{_ANALYTICS}:analytics_columns_from_metadata", _ROWS, shape="(metadata)", is_optional=True),
    Seam(f"{_ANALYTICS}:bounded_model_dimension", _ROWS, shape="(value)", is_optional=True),
    Seam("mlflow.store.tracking.utils.sql_trace_rollups:rollups_enabled", _ROWS, shape="()", is_optional=True),
    # MLflow, requests
    Seam(f"{_UTILS}:generate_mlflow_trace_id_from_otel_trace_id", _SCOPE, shape="(otel_trace_id)"),
    Seam("opentelemetry.sdk.trace:TracerProvider._tracers", _SCOPE, shape=".values", is_optional=True),
    # MLflow, whole traces
    Seam("mlflow.protos.service_pb2:TraceInfoV3", _WHOLE, shape=".FromString", is_feature=True),
    Seam(f"{_REST_STORE}.log_spans", _WHOLE, shape="(self, location, spans)", is_feature=True),
    Seam(
        "mlflow.utils.rest_utils:http_request",
        _WHOLE,
        shape="(host_creds=, endpoint=, method=, extra_headers=, data=)",
        is_feature=True,
    ),
    # MLflow, in the processes of a server
    Seam("mlflow.server.otel_api:export_traces", _SERVER, shape="(request=)", is_optional=True),
    Seam("mlflow.server.otel_api:_get_tracking_store", _SERVER, shape="()", is_optional=True),
    Seam("mlflow.server.handlers:_drop_blocked_trace_tags", _SERVER, shape="(tags)", is_optional=True),
    Seam("mlflow.utils.import_hooks:register_post_import_hook", _SERVER, shape="(hook, name)", is_optional=True),
    Seam("mlflow.utils.uri:extract_db_type_from_uri", _SERVER, shape="(uri)", is_optional=True),
    Seam("mlflow.store.db.utils:create_sqlalchemy_engine", _SERVER, shape="(uri)", is_optional=True),
    Seam(
        "mlflow.tracking._tracking_service.utils:_get_sqlalchemy_store",
        _SERVER,
        shape="(uri, artifact_uri)",
        is_optional=True,
    ),
    Seam("mlflow.tracking._model_registry.utils:_get_sqlalchemy_store", _SERVER, shape="(uri)", is_optional=True),
    Seam(
        "mlflow.tracking._workspace.registry:_get_sqlalchemy_workspace_store", _SERVER, shape="(uri)", is_optional=True
    ),
    # MLflow, runs
    Seam(
        f"{_FLUENT}:_active_run_stack",
        "makes MLflow's active run follow the context",
        shape=".get .get_all_thread_values",
    ),
    Seam(f"{_FLUENT}:ActiveRun", _RUNS, shape="(run)"),
    Seam(f"{_FLUENT}:_active_experiment_id", _RUNS, shape="?.encode"),
    Seam(f"{_FLUENT}:_create_logged_model", _RUNS, shape="(name=, source_run_id=, flavor=)"),
    Seam(
        f"{_FLUENT}:_get_or_start_run",
        "lets a fluent call wait for a run that is on its way",
        shape="()",
        is_optional=True,
    ),
    Seam(f"{_FLUENT}:_last_active_run_id", _RUNS, shape=".set"),
    Seam("mlflow.dspy.util:_flatten_dspy_module_state", _RUNS, shape="(state, exclude_keys=)"),
    Seam("mlflow.dspy.util:sanitize_params", _RUNS, shape="(params)"),
    Seam("mlflow.tracking.context:registry", _RUNS, shape=".__spec__"),
    Seam("mlflow.tracking.context.registry:resolve_tags", _RUNS, shape="(tags, ignore=)"),
    Seam("mlflow.tracking.context.registry:DatabricksClusterRunContext", _RUNS, shape="() .in_context"),
    Seam("mlflow.tracking.context.registry:DatabricksCommandRunContext", _RUNS, shape="() .in_context"),
    Seam("mlflow.tracking.context.registry:DatabricksJobRunContext", _RUNS, shape="() .in_context"),
    Seam("mlflow.tracking.context.registry:DatabricksNotebookRunContext", _RUNS, shape="() .in_context"),
    Seam("mlflow.tracking.context.registry:DatabricksRepoRunContext", _RUNS, shape="() .in_context"),
    Seam("mlflow.tracking.context.registry:JupyterNotebookRunContext", _RUNS),
    Seam(f"{_UTILS}:calculate_cost_by_model_and_token_usage", _RUNS, shape="(model, usage)", is_feature=True),
    Seam(
        "mlflow.store.artifact.artifact_repository_registry:get_artifact_repository",
        _RUNS,
        shape="(uri)",
        is_feature=True,
    ),
    Seam(
        "mlflow.store.artifact.artifact_repo:ArtifactRepository._download_file",
        _RUNS,
        shape="(self, path, local)",
        is_feature=True,
    ),
    Seam(f"{_UTILS}:calculate_cost_by_model_and_token_usage.__code__", _PRICES, is_feature=True),
    Seam("mlflow.tracing.otel:translation", _PRICES, is_optional=True),
    Seam("mlflow.utils.providers:_fetch_remote_provider", _PRICES, shape="(provider)", is_optional=True),
    Seam("mlflow.utils.providers:_load_provider", _PRICES, shape="(provider)", is_optional=True),
    Seam("mlflow.utils.providers:_lookup_model_info", _PRICES, shape="(model)", is_optional=True),
    Seam("mlflow.utils:providers", "reckons what an evaluation has cost", shape=".__spec__", is_feature=True),
    Seam(
        "mlflow.utils.providers:cost_per_token",
        "reckons what an evaluation has cost",
        is_feature=True,
        shape="(model, prompt_tokens, completion_tokens)",
    ),
    Seam("mlflow.utils.mlflow_tags:MLFLOW_AUTOLOGGING", _RUNS, shape=".encode"),
    Seam("importlib.machinery:ModuleSpec._initializing", "does not wait for another thread's import", is_optional=True),
    Seam("mlflow.utils.mlflow_tags:MLFLOW_LOGGED_ARTIFACTS", _RUNS, shape=".encode"),
    Seam("mlflow.utils.mlflow_tags:MLFLOW_PARENT_RUN_ID", _RUNS, shape=".encode"),
    Seam(
        "mlflow.system_metrics.system_metrics_monitor:SystemMetricsMonitor",
        _RUNS,
        is_feature=True,
        shape="(run_id, resume_logging=) .start .finish",
    ),
    Seam(f"{_FLUENT}:run_id_to_system_metrics_monitor", _RUNS, shape=".pop .__setitem__", is_feature=True),
    # MLflow, tests
    Seam(f"{_PROVIDER}:_get_span_processors", _CAPTURE, shape="()", is_feature=True),
    Seam("opentelemetry.util._once:Once._done", _CAPTURE, shape=".__bool__", is_feature=True),
    Seam("opentelemetry.trace:_TRACER_PROVIDER", _CAPTURE, shape="?.get_tracer", is_feature=True),
    # OpenTelemetry, under MLflow
    Seam(
        "opentelemetry.context:_SUPPRESS_INSTRUMENTATION_KEY",
        "keeps the writing of traces out of the traces",
        is_feature=True,
        shape=".encode",
    ),
    Seam("opentelemetry.context:_RUNTIME_CONTEXT", _CONTEXT, shape=".get_current", is_optional=True),
    Seam("mlflow.utils.rest_utils:verify_rest_response", _WRITE, shape="(response, endpoint)", is_optional=True),
    Seam("urllib3.connectionpool:HTTPConnectionPool._get_conn", _WRITE, shape="(self)", is_optional=True),
    Seam("urllib3.connectionpool:HTTPConnectionPool._put_conn", _WRITE, shape="(self, conn)", is_optional=True),
    Seam("opentelemetry.sdk.trace:TracerProvider._active_span_processor", _EXPORT, shape=".on_start"),
    Seam("opentelemetry.sdk.trace:SynchronousMultiSpanProcessor._span_processors", _EXPORT, shape=".__iter__"),
    Seam("opentelemetry.sdk.trace:ReadableSpan._attributes", _SPANS, shape=".get"),
    *(
        Seam(f"opentelemetry.sdk.trace:{name}", _CALLS, is_optional=True)
        for name in (
            *("ReadableSpan._name", "ReadableSpan._start_time", "Span._end_time", "Span._kind", "Span._new_events"),
            *("Span._new_links", "Span._readable_span", "Span._status", "Tracer._instrumentation_scope"),
            "Tracer._span_limits",
        )
    ),
    Seam("opentelemetry.attributes:BoundedAttributes._immutable", _CALLS, is_optional=True),
    Seam("opentelemetry.sdk.trace.sampling:ParentBased._root", _CALLS, is_optional=True),
    Seam("opentelemetry.sdk.trace.sampling:ParentBased._local_parent_sampled", _CALLS, is_optional=True),
    Seam("mlflow.tracing.sampling:_MlflowSampler", _CALLS, shape="(ratio)", is_optional=True),
    Seam("mlflow.tracing.sampling:_MlflowSampler._default_ratio", _CALLS, is_optional=True),
    Seam("mlflow.entities.span:LiveSpan._span", _CALLS, is_optional=True),
    Seam(f"{_PROCESSOR}._trace_manager", _CAPTURE, shape=".get_trace"),
    Seam("opentelemetry.attributes:BoundedAttributes._dict", _SPANS, shape=".get", is_optional=True),
    Seam("opentelemetry.attributes:BoundedAttributes._lock", _SPANS, shape=".acquire", is_optional=True),
)

_BY_PATH = {seam.path: seam for seam in SEAMS}


def taken(path: str, otherwise: Any = None) -> Any:
    """Take the object at a listed path, so that the module that takes it can be imported in any case.

    Args:
        path: As on the list.
        otherwise: What takes its place where it has gone, or is another than we know: what does without.
    """
    return _BY_PATH[path].value_or(otherwise)


@functools.cache
def is_known(path: str) -> bool:
    """Return whether the object at a listed path, on instances of a class too, is there and as we know it."""
    seam = _BY_PATH[path]
    return seam.is_present and seam.fault is None


@functools.cache
def lost_features() -> tuple[Fault, ...]:
    """Return the names whose features are off, being not as we know them, in modules that anybody has imported."""
    return tuple(faults(seam for seam in SEAMS if (seam.is_optional or seam.is_feature) and seam.module in sys.modules))


@functools.cache
def lost_ground() -> tuple[Fault, ...]:
    """Return the names, not as we know them, that tracing needs. Looked up once: it imports MLflow's modules."""
    return tuple(faults(seam for seam in SEAMS if not (seam.is_optional or seam.is_feature)))


@functools.cache
def missing_packages() -> tuple[str, ...]:
    """Return the packages that MLflow wants for what nothing can be traced without, and that are not installed."""
    ground = (seam for seam in SEAMS if not (seam.is_optional or seam.is_feature or seam.is_present))
    return tuple(sorted({seam.needs or "" for seam in ground} - {""}))
