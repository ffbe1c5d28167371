"""The package, as `settings.ini` describes it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
name, url = cfg["lib_name"], cfg["git_url"]

setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=url,
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["published/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "docs": cfg["docs_requirements"].split(),
                    "bench": cfg["bench_requirements"].split(),
                    **{e: cfg[f"{e}_requirements"].split()
                       for e in ("timm", "onnx", "hf", "datasets", "fabric")}},
    entry_points={
        "console_scripts": [f"kd_distill={name}.cli:distill_main", f"kd_experiment={name}.cli:experiment_main",
                            f"kd_diagnose={name}.cli:diagnose_main", f"kd_report={name}.cli:report_main"],
        "nbdev": [f"{name}={name}._modidx:d"],
    },
    zip_safe=False,
)
