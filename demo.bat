@echo off
rem Does what `make demo` does: installs onecard the first time, then trains a small model and lets it write.
setlocal
call "%~dp0train.bat" demo %*
set "CODE=%ERRORLEVEL%"
rem A window opened by a double click would close before anyone could read it.
echo %CMDCMDLINE% | findstr /i /c:"%~nx0" >nul && pause
exit /b %CODE%
