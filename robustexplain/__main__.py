"""``python -m robustexplain``, and ``accelerate launch -m robustexplain``."""

from robustexplain.cli import main

if __name__ == "__main__":
    main()
