"""Command line of the package: ``python -m mmeffformer doctor``."""
import sys

from .apis import doctor

if __name__ == '__main__':
    if sys.argv[1:2] != ['doctor']:
        sys.exit('usage: python -m mmeffformer doctor [--data FOLDER]')
    sys.argv[0:2] = ['python -m mmeffformer doctor']
    sys.exit(doctor.main())
