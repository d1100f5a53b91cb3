"""Random small modules that read positions in every way the library claims to know, and what must hold for them.

``spec.py`` (what a module is made of, plain data) -> ``strategies.py`` (draws specs) -> ``reads.py``, ``chains.py``,
``masks.py`` and ``build.py`` (a spec as an ``nn.Module``) -> ``judge.py`` (export, lift, verify, and an oracle of its
own) -> ``campaign.py`` (many programs, counted by class).
"""
