"""The page that a person opens: findings, the reads as pictures, the stages. One file, no network.

``views.py`` has the records. ``reads.py`` makes them from a scanned program, ``lifted_view.py`` from a lifted one,
``stage_view.py`` from stages, ``build.py`` from whatever a target holds. ``pictures.py`` says what a picture has,
``svg.py`` draws it, the sections write the page's parts, and ``page.py`` puts them into the template.
"""
