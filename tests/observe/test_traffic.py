"""What finished requests add up to, by tenant and by model."""

from fairlead.core.generation import Phase, Usage
from fairlead.core.timeline import Phases, Timeline
from fairlead.observe.metrics import Histogram
from fairlead.observe.traffic import OTHER, Traffic


def asked(tenant: str = "acme", *, model: str = "chat", outcome: str = "success", kind: str = "generate", **fields) -> Timeline:
    made = Timeline(request_id="r", protocol="http", arrived=1.0, kind=kind, model=model, tenant=tenant, outcome=outcome, ended=2.0)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def found(traffic: Traffic) -> dict[tuple[str, ...], object]:
    return {(name, *labels): value for name, labels, value in traffic.samples()}


def test_requests_tokens_and_cost_go_to_their_tenant():
    traffic = Traffic()
    usage = Usage(prompt_tokens=10, completion_tokens=3)
    traffic([asked(usage=usage, cost=0.25), asked(usage=usage, cost=0.5), asked("zoo", outcome="refused")])
    told = found(traffic)
    assert told["fairlead_tenant_requests_total", "acme", "success"] == 2
    assert told["fairlead_tenant_requests_total", "zoo", "refused"] == 1
    assert told["fairlead_tenant_tokens_total", "acme", "input"] == 20
    assert told["fairlead_tenant_tokens_total", "acme", "output"] == 6
    assert told["fairlead_tenant_cost_total", "acme"] == told["fairlead_cost_total", "chat"] == 0.75
    assert ("fairlead_tenant_tokens_total", "zoo", "input") not in told


def test_requests_that_end_while_a_page_is_written_do_not_break_it_off():
    traffic = Traffic()
    traffic([asked()])
    samples = traffic.samples()
    next(samples)
    traffic([asked(outcome="failure"), asked("zoo", cost=1.0)])
    assert [name for name, _, _ in samples] == ["fairlead_cost_total"]


def test_tenants_beyond_the_most_are_counted_together():
    traffic = Traffic(max_tenants=2)
    traffic([asked(name) for name in ("a", "b", "c", "d", "a")])
    counted = {key[1]: value for key, value in found(traffic).items() if key[0] == "fairlead_tenant_requests_total"}
    assert counted == {"a": 2, "b": 1, OTHER: 2}


def test_no_tenant_is_named_where_none_may_be():
    traffic = Traffic(max_tenants=0)
    traffic([asked("a"), asked("b", cost=1.0)])
    assert {key[1] for key in found(traffic) if key[0].startswith("fairlead_tenant")} == {OTHER}


def test_names_that_nobody_serves_become_no_label():
    traffic = Traffic(known={"chat"}.__contains__)
    traffic([asked(model="x" * 40, cost=1.0), asked(model="chat", cost=2.0)])
    assert {key[1]: value for key, value in found(traffic).items() if key[0] == "fairlead_cost_total"} == {"": 1.0, "chat": 2.0}


def test_what_asked_no_model_is_nobodys_traffic():
    traffic = Traffic()
    traffic([asked(kind="")])
    assert found(traffic) == {}


def test_the_time_in_the_gateways_line_is_a_histogram():
    traffic = Traffic()
    traffic([asked(events=[(1.0, "queued", {"ahead": 2}), (1.3, "turn", None)]), asked(events=[(1.0, "queued", {})])])
    histogram = found(traffic)["fairlead_gateway_wait_seconds", "chat"]
    assert isinstance(histogram, Histogram)
    assert (sum(histogram.counts), round(histogram.sum, 6)) == (1, 0.3)  # the other one never had its turn


def test_vllms_histograms_of_requests_come_from_the_engines_phases():
    phases = [Phase("waiting", 0.0, 0.5), Phase("prefill", 0.5, 0.25), Phase("decode", 0.75, 1.0), Phase("prefill", 1.8, 0.25)]
    timeline = asked(usage=Usage(prompt_tokens=100, completion_tokens=7), events=[(1.0, "engine", Phases("chat", "1", 0, phases))])
    traffic = Traffic(vllm_names=True)
    traffic([timeline])
    sums = {key[0]: value.sum for key, value in found(traffic).items() if isinstance(value, Histogram)}
    assert sums == {
        "vllm:request_prefill_time_seconds": 0.5,
        "vllm:request_decode_time_seconds": 1.0,
        "vllm:request_inference_time_seconds": 1.5,
        "vllm:request_prompt_tokens": 100,
        "vllm:request_generation_tokens": 7,
    }
    quiet = Traffic()
    quiet([timeline])
    assert not any(key[0].startswith("vllm:") for key in found(quiet))
