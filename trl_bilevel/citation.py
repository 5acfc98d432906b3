"""The paper of the method, as cards cite it."""

PAPER_ID = "2511.21056"
PAPER_TITLE = "Bilevel Data Curation for LLM Fine-tuning: Offline Selection and Online Self-Refining Generation"
PAPER_CITATION = f"""\
@article{{xiao2025bilevel,
    title        = {{{{{PAPER_TITLE}}}}},
    author       = {{Quan Xiao and Yutong Xuan and Gaowen Liu and Ramana Rao Kompella and Tianyi Chen}},
    year         = 2025,
    eprint       = {{arXiv:{PAPER_ID}}},
}}"""
