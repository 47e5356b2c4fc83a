"""/metrics: valid format, values that follow the requests, and the names that dashboards expect."""

import json
import math
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rtp_llm.api.part_metrics import PartCollector
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.servers import ServerProcess
from tests.monitoring.promtool import promtool

Families = dict[str, Metric]

LATENCY: list[float] = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
TTFT: list[float] = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
]
ITL: list[float] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
TOKENS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
STEPS: list[float] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
# vLLM's buckets by our metric names. Ours may be finer, but must include these, or vLLM dashboards' quantiles break.
BUCKETS: dict[str, list[float]] = {
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": ITL,
    "request_time_per_output_token_seconds": ITL,
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_params_n": [1, 2, 5, 10, 20],
    "iteration_tokens": STEPS,
}
COUNTERS = (
    *("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
    *("num_preemptions", "request_success", "admission_rejections", "requests_resumed", "http_requests"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
    *("estimated_flops_per_gpu", "estimated_read_bytes_per_gpu", "estimated_write_bytes_per_gpu"),
    *("process_cpu_seconds", "process_restarts", "cgroup_oom_kills"),
)
GAUGES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "model_info", "build_info"),
    *("ready", "live", "state", "gang_members_expected", "gang_member_up", "gang_heartbeat_age_seconds"),
    *("weight_memory_bytes", "kv_cache_memory_bytes", "startup_seconds", "process_up", "shm_size_bytes"),
    *("process_resident_memory_bytes", "process_max_fds", "http_requests_active", "shm_orphan_bytes"),
    *("num_requests_waiting_by_reason", "cache_config_info", "rank_lag_seconds", "cgroup_memory_usage_bytes"),
)


def parse_families(text: str) -> Families:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture
def scraped(http: httpx.Client) -> Families:
    """Returns the metrics after at least one request."""
    body = {"prompt": "The matrices", "max_tokens": 3, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parse_families(response.text)


def value(families_by_name: Families, family: str, suffix: str = "", **labels: str) -> float:
    """Returns the sum of a family's samples with these labels, 0 if there are none."""
    name = f"rtp_llm_{family}{suffix}"
    samples = [s for f in families_by_name.values() for s in f.samples if s.name == name]
    return math.fsum(s.value for s in samples if labels.items() <= s.labels.items())


def test_names_and_types(scraped: Families) -> None:
    for name in COUNTERS:
        assert scraped[f"rtp_llm_{name}"].type == "counter", name
    for name in GAUGES:
        assert scraped[f"rtp_llm_{name}"].type == "gauge", name
    for name in BUCKETS:
        assert scraped[f"rtp_llm_{name}"].type == "histogram", name
    for name, family in scraped.items():
        assert name.startswith("rtp_llm_"), name
        assert family.documentation, name


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets(name: str, scraped: Families) -> None:
    samples = [s for s in scraped[f"rtp_llm_{name}"].samples if s.name.endswith("_bucket")]
    upper_bounds = {float(s.labels["le"]) for s in samples}
    assert upper_bounds >= {*BUCKETS[name], math.inf}


def test_histograms_are_cumulative(scraped: Families) -> None:
    """Bucket counts never decrease, and the last one equals the count."""
    for name, family in scraped.items():
        if family.type != "histogram":
            continue
        series: dict[str, list[float]] = {}
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "le"}
            if sample.name.endswith(("_bucket", "_count")):
                series.setdefault(str(labels), []).append(sample.value)
        for values in series.values():
            assert values == sorted(values), name
            assert values[-1] == values[-2], name


def test_serving_metrics_name_the_model(scraped: Families) -> None:
    for name in (*BUCKETS, "num_requests_running", "generation_tokens", "kv_cache_usage_perc"):
        assert {s.labels["model_name"] for s in scraped[f"rtp_llm_{name}"].samples} == {"demo"}, name
    assert value(scraped, "model_info", model_name="demo", tp_size="1") == 1
    assert value(scraped, "ready") == 1
    assert value(scraped, "state") == value(scraped, "state", state="serving") == 1
    assert value(scraped, "gang_members_expected") == value(scraped, "gang_member_up", world_rank="0") == 1
    for program in ("api", "rank0", "supervisord", "guard"):
        assert value(scraped, "process_up", program=program) == 1, program
        assert value(scraped, "process_max_fds", program=program) > value(scraped, "process_open_fds", program=program)


def test_counters_count_requests(server: ServerProcess, http: httpx.Client) -> None:
    before = parse_families(http.get("/metrics").text)
    prompt = list(range(40, 100))
    body = {"prompt": prompt, "max_tokens": 7, "ignore_eos": True, "n": 2}
    usages = [http.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
    assert http.post("/v1/completions", json={"prompt": ""}).status_code == 400
    assert http.get("/v1/nothing").status_code == 404
    after = parse_families(http.get("/metrics").text)

    def increase(family: str, suffix: str = "", **labels: str) -> float:
        return value(after, family, suffix, **labels) - value(before, family, suffix, **labels)

    assert increase("prompt_tokens", "_total") == 4 * 60
    assert increase("generation_tokens", "_total") == 4 * 7
    assert increase("request_success", "_total", finished_reason="length") == increase("request_success", "_total") == 4
    assert increase("prefix_cache_queries", "_total") == 4 * 60
    hits = increase("prefix_cache_hits", "_total")
    assert increase("prompt_tokens_cached", "_total") == hits
    # usage counts a prompt's tokens once, the metrics once per choice.
    assert 0 < usages[1]["prompt_tokens_details"]["cached_tokens"] <= hits / 2
    for histogram in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert increase(histogram, "_count") == 4
    assert increase("inter_token_latency_seconds", "_count") == 4 * 6
    assert increase("request_generation_tokens", "_sum") == 4 * 7
    assert increase("request_prompt_tokens", "_sum") == 4 * 60
    assert increase("request_params_max_tokens", "_sum") == 4 * 7
    assert (increase("request_params_n", "_count"), increase("request_params_n", "_sum")) == (2, 4)
    assert increase("iteration_tokens", "_count") >= 2 * 7
    assert increase("iteration_tokens", "_sum") + hits == 4 * (60 + 6)
    assert increase("estimated_flops_per_gpu", "_total") > 0
    assert increase("estimated_read_bytes_per_gpu", "_total") > increase("estimated_write_bytes_per_gpu", "_total") > 0
    assert increase("http_requests", "_total", handler="/v1/completions", method="POST", status="200") == 2
    assert increase("http_requests", "_total", handler="/v1/completions", method="POST", status="400") == 1
    assert increase("http_requests", "_total", handler="none", status="404") == 1  # not the path that the client sent
    assert increase("http_request_duration_seconds", "_count", handler="/v1/completions") == 3
    assert value(after, "num_requests_running") == value(after, "num_requests_waiting") == 0


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    with ApiServer(byte_model) as api:
        yield api


def test_gauges_follow_the_engine(api: ApiServer, byte_model: ByteModel) -> None:
    """Gauges show the engine's current values. Counters continue after a lost engine, although the new engine counts
    from 0."""
    model = {"model_name": "fake"}

    def send_stats(**stats: int) -> None:
        api.engine.send_frame(**stats)
        api.wait_until(lambda: api.metric("rtp_llm_num_requests_running", **model) == stats["running"])

    send_stats(running=3, waiting=5, kv_used=16, preemptions=2, prefix_queries=100, prefix_hits=40)
    assert api.metric("rtp_llm_num_requests_waiting", **model) == 5
    assert api.metric("rtp_llm_kv_cache_usage_perc", **model) == 0.25
    assert api.metric("rtp_llm_kv_cache_used_tokens", **model) == 256
    assert api.metric("rtp_llm_kv_cache_capacity_tokens", **model) == 1024
    send_stats(
        running=4, preemptions=3, prefix_queries=110, prefix_hits=40, drafts=2, draft_tokens=9, accepted_tokens=7
    )
    api.engine.close()
    api.new_engine(epoch=2)
    api.engine.wait_for_connection()
    send_stats(running=1, preemptions=1, prefix_queries=7, prefix_hits=6)
    assert api.metric("rtp_llm_num_preemptions_total", **model) == 4
    assert api.metric("rtp_llm_prefix_cache_queries_total", **model) == 117
    assert api.metric("rtp_llm_prefix_cache_hits_total", **model) == 46
    assert api.metric("rtp_llm_spec_decode_num_drafts_total", **model) == 2
    assert api.metric("rtp_llm_spec_decode_num_draft_tokens_total", **model) == 9
    assert api.metric("rtp_llm_spec_decode_num_accepted_tokens_total", **model) == 7
    send_stats(running=0, preemptions=1, prefix_queries=7, prefix_hits=6)


def test_waiting_sequences_are_counted_by_reason(api: ApiServer) -> None:
    """Sequences wait for a slot (capacity) or for lost ranks (deferred)."""

    def waiting() -> tuple[float, float]:
        name = "rtp_llm_num_requests_waiting_by_reason"
        capacity, deferred = (api.metric(name, model_name="fake", reason=r) for r in ("capacity", "deferred"))
        return capacity, deferred

    api.engine.send_frame(waiting=5)
    api.wait_until(lambda: waiting() == (5, 0))
    with api.open_stream("/v1/completions", {"prompt": "a", "stream": True}):
        api.engine.next_submission()
        api.engine.close()
        api.wait_until(lambda: waiting() == (0, 1))
        api.new_engine(epoch=3)
        api.engine.wait_for_connection()
        api.wait_until(lambda: waiting() == (0, 0))
    config = {"block_size": "16", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}
    assert api.metric("rtp_llm_cache_config_info", model_name="fake", **config) == 1


def test_state_of_a_draining_part(start_api: StartApi) -> None:
    api = start_api()
    api.write_gang_status()
    assert api.metric("rtp_llm_state", state="serving") == 1
    api.state.is_draining = True
    assert api.metric("rtp_llm_state", state="draining") == 1


def test_the_last_rank_to_enter_all_reduce_lags(api: ApiServer) -> None:
    """The rank that waits least for the others entered last."""
    api.write_gang_status(wait_s=0.002)
    gang_status = json.loads(api.part_spec.gang_status_path.read_text())
    gang_status["ranks"]["1"] = gang_status["ranks"]["0"] | {"wait_s": 0.005}
    api.part_spec.gang_status_path.write_text(json.dumps(gang_status))
    assert api.metric("rtp_llm_rank_lag_seconds", rank="0", part="0") == pytest.approx(0.003)
    assert api.metric("rtp_llm_rank_lag_seconds", rank="1", part="0") == 0


# The series of vLLM 0.33 that its dashboards use.
VLLM = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"),
    *("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total"),
    *("vllm:spec_decode_num_accepted_tokens_total",),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
    *("vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_sum"),
    *("vllm:request_prefill_time_seconds_sum", "vllm:request_decode_time_seconds_sum"),
    *("vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:iteration_tokens_total_bucket", "vllm:cache_config_info"),
)


def test_vllm_aliases_enabled(start_api: StartApi) -> None:
    api = start_api(metrics_vllm_aliases=True)
    api.engine.script = lambda submission: [ScriptedOutput(submission.prompt[:1], "length")]
    api.post("/v1/completions", {"prompt": "a"})
    text = api.get("/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    aliases = {s.name for s in samples if s.name.startswith("vllm:")}
    assert aliases >= set(VLLM)
    values = {(s.name, *sorted(s.labels.items())): s.value for s in samples}
    for sample in samples:
        if sample.name.startswith("vllm:"):
            name = sample.name.replace("vllm:iteration_tokens_total", "vllm:iteration_tokens")
            labels = {k: v for k, v in sample.labels.items() if k != "engine"}
            assert sample.labels["engine"] == "0"
            assert values[name.replace("vllm:", "rtp_llm_"), *sorted(labels.items())] == sample.value


def test_vllm_aliases_are_off_by_default(api: ApiServer) -> None:
    assert "vllm:" not in api.get("/metrics").text


def test_every_request_counts_with_one_finish_reason(api: ApiServer, byte_model: ByteModel) -> None:
    """Each sequence counts once as finished, no matter if the client, the API or the engine ends it."""

    def finished() -> dict[str, float]:
        reasons = ("stop", "length", "abort", "error")
        name = "rtp_llm_request_success_total"
        return {r: api.metric(name, finished_reason=r, model_name="fake") for r in reasons}

    before = finished()
    for output in ([byte_model.end], "stop"), (byte_model.tokens("a"), "length"), ([], "error"):
        api.engine.script = lambda s, output=output: [ScriptedOutput(*output, error="x")]  # type: ignore[misc]
        api.post("/v1/completions", {"prompt": "a"})
    api.engine.script = None
    with api.open_stream("/v1/completions", {"prompt": "a", "stream": True}):
        for _ in range(4):
            api.engine.next_submission()
    api.wait_until(lambda: finished()["abort"] == before["abort"] + 1)
    assert finished() == {reason: count + 1 for reason, count in before.items()}


def test_promtool_reports_no_problems(http: httpx.Client) -> None:
    """promtool, Prometheus's linter, finds no problem in the text of /metrics."""
    result = promtool("check", "metrics", text=http.get("/metrics").text)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_cpu_seconds_of_a_program_survive_its_restart(start_api: StartApi) -> None:
    """A rank that is lost (no values) and comes back as another process continues the counter of the first one."""
    api = start_api()
    snapshot = api.state.metrics_snapshot()
    processes = [
        {"up": 1.0, "start_time": 10.0, "cpu": 5.0},
        {"up": 1.0, "start_time": 10.0, "cpu": 7.0},
        {"up": 0.0},
        {"up": 1.0, "start_time": 20.0, "cpu": 1.0},
        {"up": 1.0, "start_time": 30.0, "cpu": 2.0},
    ]
    remaining = iter(processes)
    collector = PartCollector(lambda: {**snapshot, "processes": {"rank0": next(remaining)}})
    totals = [
        sample.value
        for _ in processes
        for family in collector.collect()
        for sample in family.samples
        if sample.name == "rtp_llm_process_cpu_seconds_total"
    ]
    assert totals == [5, 7, 7, 8, 10]
