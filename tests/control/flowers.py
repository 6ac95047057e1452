"""A real small model, trained when it is first needed, with versions that are wrong in every way that a gate looks for."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from fairlead.control.checks import Checks, Dataset, Golden, Rules, packed, tensor_of
from fairlead.control.gates.plan import Plan, Subject
from fairlead.core.specs import ModelSpec


class Iris:
    """Its artefact in a folder; what it was not trained on."""

    def __init__(self, folder: Path) -> None:
        data = load_iris()
        x, self.x, y, self.y = train_test_split(
            data.data.astype(np.float32), data.target, test_size=0.6, random_state=7, stratify=data.target
        )
        model = LogisticRegression(max_iter=2000).fit(x, y)
        shutil.copy(Path(__file__).with_name("flowers_model.py"), folder / "model.py")
        np.savez(folder / "weights.npz", w=model.coef_.T, b=model.intercept_)
        self.folder = folder
        self.scores = model.predict_proba(self.x)

    def subject(self, fault: str = "", version: str = "1", **parameters: Any) -> Subject:
        spec = ModelSpec(name="iris", parameters={"fault": fault, **parameters})
        return Subject(spec=spec, folder=str(self.folder), version=version)

    def checks(self, rules: Rules | None = None, *, num_golden: int = 4) -> Checks:
        golden = tuple(
            Golden(
                name=f"flower {row}",
                inputs=(tensor_of("x", self.x[row : row + 1]),),
                outputs=(tensor_of("scores", self.scores[row : row + 1].astype(np.float32)),),
            )
            for row in range(num_golden)
        )
        return Checks(rules=rules or Rules(), golden=golden, dataset=Dataset(inputs={"x": packed(self.x)}, labels=packed(self.y)))

    def plan(self, fault: str = "", rules: Rules | None = None, *, against: bool = False, num_golden: int = 4, **parameters: Any) -> Plan:
        return Plan(
            candidate=self.subject(fault, "2", **parameters),
            champion=self.subject() if against else None,
            checks=self.checks(rules, num_golden=num_golden),
        )
