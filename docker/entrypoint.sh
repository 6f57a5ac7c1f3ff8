#!/bin/sh
# Started as root, goes on as the owner of the folder mounted at /runs, so that what is written
# there belongs to whoever brought the folder; a folder of root's is given to the image's own user.
set -eu
if [ "$(id -u)" -ne 0 ]; then
    exec "$@"
fi
if [ "$(stat -c %u /runs)" -eq 0 ]; then
    chown gkd:gkd /runs
fi
chown "$(stat -c %u:%g /runs)" /cache
exec setpriv --reuid="$(stat -c %u /runs)" --regid="$(stat -c %g /runs)" --clear-groups \
    --no-new-privs "$@"
