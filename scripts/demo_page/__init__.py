"""The web page of scripts/demo.sh: what sounds in a video, and what is painted when the sound is another.

`page.py` is the layout in Gradio; everything that it does is in modules that need no Gradio.
"""
