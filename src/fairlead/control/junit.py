"""A validation as JUnit's XML, which every CI shows."""

import re
from xml.etree.ElementTree import Element, SubElement, tostring

import msgspec

from fairlead.control.gates.report import Outcome, Report

ELEMENTS = {Outcome.FAILED: "failure", Outcome.ERROR: "error", Outcome.SKIPPED: "skipped"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> bytes:
    """One test suite, one test case a gate."""
    counts = {outcome: sum(gate.outcome is outcome for gate in report.gates) for outcome in ELEMENTS}
    name = f"{report.model}@{report.version}"
    suites = Element("testsuites")
    suite = SubElement(
        suites,
        "testsuite",
        name=_plain(f"fairlead {name}"),
        tests=str(len(report.gates)),
        failures=str(counts[Outcome.FAILED]),
        errors=str(counts[Outcome.ERROR]),
        skipped=str(counts[Outcome.SKIPPED]),
        time=f"{report.seconds:.3f}",
    )
    for gate in report.gates:
        case = SubElement(suite, "testcase", classname=_plain(name), name=gate.gate, time=f"{gate.seconds:.3f}")
        if element := ELEMENTS.get(gate.outcome):
            SubElement(case, element, message=_plain(gate.message))
        words = gate.message if not gate.details else f"{gate.message}\n{msgspec.json.encode(gate.details).decode()}"
        SubElement(case, "system-out").text = _plain(words)
    SubElement(suite, "system-err").text = _plain(report.log)
    body: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return body + b"\n"


def _plain(text: str) -> str:
    """Without what XML has no way to write."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
