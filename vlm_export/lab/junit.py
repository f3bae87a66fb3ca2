"""JUnit XML of a regression test, as GitLab, Jenkins and GitHub's actions read it: a testcase for each check."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from vlm_export.lab.regress import CaseResult
from vlm_export.text_display import shown, shown_lines


def junit_xml(results: Sequence[CaseResult]) -> bytes:
    """The document; a suite for each case, whose seconds stand with its first check, and figures as properties."""
    root = ElementTree.Element("testsuites", name="vlm-export regress")
    for result in results:
        failed = sum(1 for check in result.checks if check.failures)
        counts = {"tests": str(len(result.checks)), "failures": str(failed), "errors": "0", "skipped": "0"}
        stated = {"name": shown(result.name), "time": f"{result.seconds:.3f}", **counts}
        suite = ElementTree.SubElement(root, "testsuite", stated)
        properties = ElementTree.SubElement(suite, "properties")
        for figure in result.figures:
            ElementTree.SubElement(properties, "property", name=shown(figure.name), value=figure.sides)
        for number, check in enumerate(result.checks):
            seconds = result.seconds if number == 0 else 0.0
            place = {"classname": shown(result.name), "name": check.name, "time": f"{seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", place)
            if check.failures:
                told = ElementTree.SubElement(case, "failure", message=shown(check.failures[0]))
                told.text = shown_lines("\n".join(check.failures))
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document
