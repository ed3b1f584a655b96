"""Draws images beside their random views as the training of this configuration sees them: its seeds, its bits.

python runners/show_views.py --config F --set key=value … --images 8 --epoch 0 --out views.png
"""

from instance_ssl.stages.show_views import main

if __name__ == "__main__":
    raise SystemExit(main())
